"""Networks of finished and unfinished streams, to be exported and made again without their data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.images import ImageData
from cl_benchmarks.method import Horizon
from cl_benchmarks.preparing import attach_intervention, prepare
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import chunk_datasets
from dynmoe.lab.export import Exporter, no_checkpoint


def horizon_of(config: Config, sizes: list[int]) -> Horizon:
    """How long a stream of chunks of these sizes, in images, is."""
    steps = sum(-(-size // config.batch_size) * config.epochs for size in sizes)
    return Horizon(steps, len(sizes), config.batch_size)


@dataclass(frozen=True)
class Shape:
    """Of an image."""

    shape: tuple[int, int, int]
    """(C, H, W)"""


class StreamExporter(Exporter):
    """The network as the newest checkpoint has it: of a finished run, after the last task."""

    def state(
        self,
        folder: Path,
        config: Config,
        shared: ImageData,
        saved: dict[str, Any] | None,
        part: str,
    ) -> dict[str, Any]:
        """Weights, the sizes that the network follows from, and what has changed its make."""
        if saved is None:
            raise no_checkpoint(folder, "there is a checkpoint after the first task")
        protocol = config.protocol.build()
        chunks = protocol.stream(shared, config.chunks, config.access, config.seed)
        train, _ = chunk_datasets(shared, chunks)
        horizon = horizon_of(config, [len(chunk) for chunk in train])
        outputs = protocol.num_outputs(shared, config.chunks)
        state = {
            "shape": list(shared.shape), "outputs": outputs,
            "horizon": [horizon.steps, horizon.tasks, horizon.batch],
        }  # fmt: skip
        plugins = _plugins(config, state)[1]
        of_run = saved["trainer"]["plugins"][: len(plugins)]  # the protocol's own come behind
        kept = [
            own if hasattr(plugin, "rebuild_from") else {}
            for plugin, own in zip(plugins, of_run, strict=True)
        ]
        return {**state, "plugins": kept, "weights": saved["trainer"]["model"]}

    def network(self, config: Config, state: dict[str, Any]) -> nn.Module:
        """The network: images [B, C, H, W] -> logits [B, outputs]."""
        model, plugins = _plugins(config, state)
        for plugin, own in zip(plugins, state["plugins"], strict=True):
            if own and hasattr(plugin, "rebuild_from"):
                plugin.rebuild_from(own)
        model.load_state_dict(state["weights"])
        return model.eval()

    def usage(self, config: Config, shared: ImageData, part: str) -> str:
        """Shapes, and how pixels become input."""
        channels, height, width = shared.shape
        outputs = config.protocol.build().num_outputs(shared, config.chunks)
        shapes = f"float32 [B, {channels}, {height}, {width}] -> logits [B, {outputs}]"
        made = "as the data set has them"
        if not shared.train_images.is_floating_point():
            chunks = config.protocol.build().stream(
                shared, config.chunks, config.access, config.seed
            )
            first = chunk_datasets(shared, chunks)[0][0]
            mean, std = (" ".join(f"{v:.4f}" for v in t.tolist()) for t in (first.mean, first.std))
            made = f"pixels / 255, minus {mean}, divided by {std} (by channel)"
        return f"`model(images)`: {shapes}. Images: {made}."


def _plugins(config: Config, state: dict[str, Any]) -> tuple[nn.Module, list[Any]]:
    """A new network of these sizes, and the plugins that may have changed its make in a run.

    An intervention that does not change it is left out: it would only watch.
    """
    horizon = Horizon(*state["horizon"])
    channels, height, width = state["shape"]
    shape = Shape((channels, height, width))
    training = prepare(config, shape, state["outputs"], horizon, torch.device("cpu"))
    plugins: list[Any] = config.method.build().plugins(config, training)
    if training.intervention.reshapes:
        growth = next((p for p in plugins if isinstance(p, GrowthPlugin)), None)
        plugins.append(attach_intervention(config, training, growth))
    return training.model, plugins

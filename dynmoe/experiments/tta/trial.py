"""One run of test-time adaptation: one method along one stream, with checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.embedded import Embedded
from cl_benchmarks.shifts.stream import ShiftSource, Stream, make_stream
from dynmoe import seeding
from dynmoe.experiments.tta.settings import Config
from dynmoe.experiments.tta.source_model import normalise
from dynmoe.experiments.tta.variants import for_run
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.run import Run
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.diagnostics import expert_similarity, use_of_experts
from dynmoe.tta.tally import Tally
from dynmoe.tta.usefulness import usefulness


def run_method(preset: str, config: Config, source: ShiftSource, model: nn.Module) -> None:
    """Adapt a model along one stream, or see that it is done; the result is in summary.json.

    Args:
        preset: part of the run's name.
        config: one stream, one seed.
        source: the images.
        model: the trained model; changed in place.
    """
    with open_run(preset, config) as run:
        if run.summary is None:
            run.finish(_adapt(run, config, source, model.to(run.device)))


def open_run(preset: str, config: Config) -> Run:
    """The run of these settings; it knows its folder, and touches nothing before it is entered."""
    return Run("tta", preset, config, f"{config.method.part.name}-{safe(config.streams[0])}")


def shifted(config: Config, source: ShiftSource) -> Stream:
    """The stream of a run.

    Raises:
        UserError: its data are missing.
    """
    return make_stream(source, config.streams[0], config.order, config.severity,
                       config.batch_size, config.seed, config.limit)  # fmt: skip


def make_adapter(config: Config, model: nn.Module) -> Adapter:
    """The method of a run, around the model.

    Raises:
        UserError: it cannot adapt this model, or an option is out of range.
    """
    return for_run(config.method, config.lr_scale, config.seed, model).build(model)


def safe(text: str) -> str:
    """A label as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "+._-" else "-" for c in text)


def _adapt(run: Run, config: Config, source: ShiftSource, model: nn.Module) -> dict[str, Any]:
    """The whole stream, from the start or from the run's checkpoint; returns the summary."""
    stream, adapter = shifted(config, source), make_adapter(config, model)
    tally, history, start = Tally(stream.names, config.window), [], 0
    if run.restored is not None:
        start, history = run.restored["batch"], run.restored["history"]
        tally.load_state_dict(run.restored["tally"])
        adapter.load_state_dict(run.restored["adapter"])
    elif adapter.source_images:
        adapter.observe_source(_source_batches(config, source, adapter.source_images, run.device))
    with ProgressLine(f"{config.method.part.name}, {config.streams[0]}", len(stream)) as progress:
        progress.start_at(start)
        for number in range(start, len(stream)):
            batch = stream.batch(number)
            images = normalise(batch.images.to(run.device), source.mean, source.std)
            logits = adapter(images)
            if tally.add(logits, batch.labels, batch.domains):
                history.append(_log(run, number + 1, tally, adapter))
            if progress.due(number + 1):
                progress.update(number + 1, accuracy=tally.accuracy)
            if run.checkpoint_due():
                run.checkpoint(number + 1, {
                    "batch": number + 1, "tally": tally.state_dict(), "history": history,
                    "adapter": dict(adapter.state_dict()),
                })  # fmt: skip
    routings = _routings(run, config, source, stream, adapter)
    return _summary(config, source, stream, adapter, tally, history) | {"routings": routings}


def _routings(
    run: Run, config: Config, source: ShiftSource, stream: Stream, adapter: Adapter
) -> dict[str, dict[str, float]]:
    """`usefulness` on the stream's last batches, at the weights that the stream has left."""
    if not config.routing_batches:
        return {}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(max(len(stream) - config.routing_batches, 0), len(stream)):
            batch = stream.batch(number)
            images = normalise(batch.images.to(run.device), source.mean, source.std)
            yield images, batch.labels.to(run.device)

    return usefulness(adapter.model, batches, seeding.generator(config.seed, "usefulness"))


def _log(run: Run, step: int, tally: Tally, adapter: Adapter) -> dict[str, Any]:
    """Write down a window's accuracy and what the experts do; returns the latter."""
    use = use_of_experts(adapter)
    scalars = {"accuracy/window": tally.curve[-1], "accuracy/so far": tally.accuracy,
               "adapter/skipped": float(adapter.skipped)}  # fmt: skip
    scalars |= {f"routing/{key}": value for key, value in use.items()}
    similar = expert_similarity(adapter)
    known = [s for s in similar if s is not None]
    if known:
        scalars["experts/similarity"] = sum(known) / len(known)
    run.log.scalars(step, scalars)
    return {"batch": step, **use, **({"similarity": similar} if similar else {})}


def _summary(
    config: Config,
    source: ShiftSource,
    stream: Stream,
    adapter: Adapter,
    tally: Tally,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """What summary.json holds: nothing that changes from run to run."""
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    return {
        "method": config.method.part.name, "data": source.name, "stream": config.streams[0],
        "order": config.order, "seed": config.seed, "images": stream.num_images,
        "accuracy": tally.accuracy, "domains": tally.domains(), "curve": tally.curve,
        "steps": adapter.steps, "skipped": adapter.skipped, "trained": trained, "history": history,
    }  # fmt: skip


def _source_batches(
    config: Config, source: ShiftSource, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Clean images, a random choice: training images where there are some, else validation's."""
    generator = seeding.generator(config.seed, "source-images")
    if isinstance(source, Embedded):
        images = source.training_images()[0]
        chosen = torch.randperm(len(images), generator=generator)[:count]
        parts = (images[part] for part in chosen.split(config.batch_size))
    else:
        clean = source.other("clean")
        chosen = torch.randperm(len(clean), generator=generator)[:count]
        parts = (clean.images(part.tolist()) for part in chosen.split(config.batch_size))
    for part in parts:
        yield normalise(part.to(device), source.mean, source.std)

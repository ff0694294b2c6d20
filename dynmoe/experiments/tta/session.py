"""One run: a method along a stream of shifted images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.embedded import Embedded
from cl_benchmarks.shifts.stream import Batch, ShiftSource, Stream, make_stream
from dynmoe import seeding
from dynmoe.experiments.boards import TTA
from dynmoe.experiments.tta.costs import Cost
from dynmoe.experiments.tta.frozen import offer
from dynmoe.experiments.tta.gates import Forgetting, Gates
from dynmoe.experiments.tta.settings import Config, for_run
from dynmoe.experiments.tta.source_model import normalise
from dynmoe.lab.experiment import Session
from dynmoe.lab.recorder import Recorder
from dynmoe.lab.run import Run
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.measures import Tally, expert_similarity, use_of_experts, usefulness


class StreamSession(Session):
    """One method along one stream."""

    def __init__(self, run: Run, config: Config, source: ShiftSource, model: nn.Module) -> None:
        self.run, self.config, self.source = run, config, source
        self.gates = Gates(config, source, run.device)
        if run.restored is None:
            self.gates.before(model)
        self.forgetting = Forgetting(config, source, run.device)
        self.cost = Cost(run.device)
        self.stream, self.adapter = shifted(config, source), make_adapter(config, model)
        self.model = self.adapter
        self.tally = Tally(self.stream.names, config.window)
        self.history: list[dict[str, Any]] = []
        self.done = 0
        label = f"{config.method.part.name}, {config.streams[0]}"
        self.recorder = Recorder(run, label, len(self.stream), self.state, "batches")
        run.log.use(TTA)
        if run.restored is None and self.adapter.source_images:
            self.adapter.observe_source(source_batches(config, source, self.adapter, run.device))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a batch."""
        self.done, self.history = state["batch"], state["history"]
        self.gates.figures = state.get("gates", {})
        self.forgetting.points = state.get("forgetting", [])
        self.tally.load_state_dict(state["tally"])
        self.adapter.load_state_dict(state["adapter"])
        self.recorder.progress.start_at(self.done)

    def work(self) -> None:
        """All batches that are left."""
        if self.done == 0:
            self._measure()
        for number in range(self.done, len(self.stream)):
            batch = self.stream.batch(number)
            images = self._images(batch)
            with self.cost.step(len(images)):
                logits = self.adapter(images)
            self.done = number + 1
            self._measure()
            if self.tally.add(logits, batch.labels, batch.domains):
                self.history.append(self._log())
            self.recorder.step_done(self.done, lambda: {"accuracy": self.tally.accuracy})
        if self.config.keep_model:
            self.recorder.save(self.done)

    def state(self) -> dict[str, Any]:
        """After the latest batch."""
        return {
            "batch": self.done, "tally": self.tally.state_dict(), "history": self.history,
            "adapter": dict(self.adapter.state_dict()),
            "gates": self.gates.figures, "forgetting": self.forgetting.points,
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Accuracy in all, by window and by domain; use of the experts; the routing compared."""
        config, adapter, tally = self.config, self.adapter, self.tally
        routings = self._routings()
        trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        options = {
            o: getattr(config.method, o)
            for o in adapter.by_stream(config.streams[0], config.method)
        }
        images = self._images(self.stream.batch(len(self.stream) - 1))
        self.cost.write(self.run.folder, adapter, images)
        return {
            "method": config.method.part.name, "data": self.source.name,
            "stream": config.streams[0], "order": config.order, "seed": config.seed,
            "images": self.stream.num_images, "accuracy": tally.accuracy,
            "domains": tally.domains(), "curve": tally.curve, "steps": adapter.steps,
            "skipped": adapter.skipped, "trained": trained, "history": self.history,
            "routings": routings, "calibration": tally.calibration(), "gates": self.gates.figures,
            "forgetting": self.forgetting.points, "options": options,
        }  # fmt: skip

    def _measure(self) -> None:
        """Where it is time: the domains' alignment, and the clean images held out."""
        aligned = self.gates.during(self.done, len(self.stream), self.adapter)
        clean = self.forgetting.look(self.done, self.adapter)
        found = {"gates/alignment": aligned, "accuracy/clean, held out": clean}
        known = {tag: value for tag, value in found.items() if value is not None}
        if known:
            self.run.log.scalars(self.done, known)

    def _routings(self) -> dict[str, dict[str, float]]:
        """`usefulness` on the stream's last batches, at the weights that the stream has left."""
        stream, count = self.stream, self.config.routing_batches
        if not count:
            return {}

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for number in range(max(len(stream) - count, 0), len(stream)):
                batch = stream.batch(number)
                device = self.run.device
                yield self._images(batch), batch.labels.to(device), batch.domains.to(device)

        generator = seeding.generator(self.config.seed, "usefulness")
        return usefulness(self.adapter.model, batches, generator)

    def _log(self) -> dict[str, Any]:
        """Write down a window's accuracy and what the experts do; returns the latter."""
        use, similar = use_of_experts(self.adapter), expert_similarity(self.adapter)
        scalars = {"accuracy/window": self.tally.curve[-1], "accuracy/so far": self.tally.accuracy,
                   "adapter/skipped": float(self.adapter.skipped)}  # fmt: skip
        scalars |= {f"routing/{key}": value for key, value in use.items()}
        known = [s for s in similar if s is not None]
        if known:
            scalars["experts/similarity"] = sum(known) / len(known)
        self.run.log.scalars(self.done, scalars)
        return {"batch": self.done, **use, **({"similarity": similar} if similar else {})}

    def _images(self, batch: Batch) -> Tensor:
        """Input of the model, on the run's device."""
        source = self.source
        x = normalise(batch.images.to(self.run.device), source.mean, source.std)
        return offer(self.adapter.model, x, batch.places, f"{source.mean} {source.std}")


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


def source_batches(
    config: Config, source: ShiftSource, adapter: Adapter, device: torch.device
) -> Iterator[Tensor]:
    """Clean images, a random choice: training images where there are some, else validation's.

    As many as the adapter asks for, in batches [B, 3, S, S] of `config.batch_size`; one more in the
    last where a single image would be left for a model that normalises by the batch.
    """
    generator = seeding.generator(config.seed, "source-images")
    pool = source.training_images()[0] if isinstance(source, Embedded) else source.other("clean")
    chosen = torch.randperm(len(pool), generator=generator)[: adapter.source_images]
    cuts = list(chosen.split(config.batch_size))
    if adapter.by_batch and len(cuts) > 1 and len(cuts[-1]) == 1:
        cuts[-2:] = [torch.cat(cuts[-2:])]
    for cut in cuts:
        part = pool[cut] if isinstance(pool, Tensor) else pool.images(cut.tolist())
        yield normalise(part.to(device), source.mean, source.std)

"""Test-time adaptation: methods along streams of shifted images."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.embedded import Embedded
from cl_benchmarks.shifts.stream import STREAMS, ShiftSource, Stream, make_stream
from dynmoe import seeding
from dynmoe.errors import UserError, unknown
from dynmoe.experiments.tta.figures import experts_figure, print_domains, print_routings
from dynmoe.experiments.tta.settings import Config, for_run, parse_variant
from dynmoe.experiments.tta.source_model import Shared, make_source, normalise
from dynmoe.lab.config import RunConfig
from dynmoe.lab.device import make_deterministic, resolve
from dynmoe.lab.experiment import At, Curve, Details, Experiment, Results, Session
from dynmoe.lab.figures import band, dots, new_figure, save
from dynmoe.lab.files import write_json
from dynmoe.lab.recorder import Recorder
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import confidence_interval, three
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.measures import Tally, alignment, expert_similarity, use_of_experts, usefulness
from dynmoe.tta.options import for_classes

EXPERTS = ("balance", "largest_share", "used_experts", "router_entropy", "similarity")
"""Metrics of the experts' history; none for methods without experts."""


@dataclass(frozen=True)
class TestTimeAdaptation(Experiment):
    """What `dynmoe.tta` does: one run is one method along one stream.

    Metrics: `accuracy`; `clean`, that of the clean images in the stream; `routing_gain`, accuracy
    under the learned routing minus that under a random one; and those in `EXPERTS`. `at` is the
    stream's first tenth, its last tenth, or all of it.
    """

    __test__ = False  # pytest reads the name as that of a test

    command = "tta"
    least: ClassVar[dict[str, float]] = {
        "batch_size": 1, "window": 1, "lr_scale": 0.0, "routing_batches": 0, "alignment": 0,
    }  # fmt: skip
    metric = "accuracy"
    at = "mean"
    span = "first to last tenth of the stream"
    columns = (
        ("accuracy", "accuracy", "mean"),
        ("last tenth", "accuracy", "last"),
        ("clean images", "clean", "mean"),
        ("most loaded expert", "largest_share", "last"),
        ("router entropy", "router_entropy", "last"),
        ("likeness of experts", "similarity", "last"),
        ("learned - random routing", "routing_gain", "mean"),
    )
    references = ("noadapt", "tent")
    about = ("data", "streams", "order", "severity", "limit")

    def check(self, config: Config) -> None:
        """Also the streams' names."""
        super().check(config)
        for stream in config.streams:
            if stream not in STREAMS:
                raise unknown("stream", stream, STREAMS)
        if not config.streams or len(set(config.streams)) < len(config.streams):
            raise UserError("--streams needs one or more streams, each named once")
        if config.data == "embedded" and "validation" in config.streams:
            raise UserError("the stream validation needs --data imagenet: its corruptions have no "
                            "32-pixel version")  # fmt: skip

    def settle(self, config: Config) -> Config:
        """With the method's options that follow the number of classes."""
        return _fitted(config, make_source(config)[0].num_classes)

    def variants(self, config: Config, shared: Shared) -> dict[str, dict[str, Config]]:
        """On every stream the method itself, then those compared with.

        Raises:
            UserError: a variant that cannot be read, is named twice, or cannot work.
        """
        own, classes = config.method.part.name, shared.source.num_classes
        texts = [t for t in config.compare if config.compare != Config.compare or t != own]
        if len({own, *texts}) < 1 + len(texts):
            raise UserError(
                f"--compare {' '.join(texts)}: a method is named twice ({own} runs anyway)"
            )
        methods = {text: parse_variant(text, classes) for text in texts}
        found = {own: _fitted(config, classes)}
        found |= {label: replace(config, method=method) for label, method in methods.items()}
        streams = [shifted(replace(config, streams=(s,)), shared.source) for s in config.streams]
        for one in found.values():  # what cannot work shows now
            _check_batches(make_adapter(one, copy.deepcopy(shared.model)), config, streams)

        def trial(label: str, one: Config, stream: str) -> Config:
            name = f"{config.name}-{safe(label)}-{safe(stream)}" if config.name else None
            return replace(one, streams=(stream,), name=name, resume=True)

        return {s: {label: trial(label, one, s) for label, one in found.items()}
                for s in config.streams}  # fmt: skip

    def label(self, config: Config, shared: Shared) -> str:
        """Method and stream."""
        return f"{config.method.part.name}-{safe(config.streams[0])}"

    def load(self, config: Config) -> Shared:
        """The images and the trained model."""
        return make_source(config)

    def prepare(self, run: Run, config: Config, shared: Shared) -> StreamSession:
        """The stream, and the method around a copy of the model."""
        return StreamSession(run, config, shared.source, copy.deepcopy(shared.model).to(run.device))

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """A number of the run, nan where it has none."""
        if metric == "accuracy":
            return summary["accuracy"] if at == "mean" else _part(summary["curve"], at)
        if metric == "clean":
            return summary["domains"].get("clean", {}).get("accuracy", math.nan)
        if metric == "routing_gain":
            found = summary["routings"]
            return found["learned"]["accuracy"] - found["random"]["accuracy"] if found else math.nan
        return _part([_number(point.get(metric)) for point in summary["history"]], at)

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Accuracies and shares in points; entropy and cosines as they are."""
        if metric in ("balance", "used_experts", "router_entropy", "similarity"):
            return 1.0, "", 2
        return super().unit(metric)

    def describe(self, metric: str, at: At) -> str:
        """Such as "accuracy, whole stream"."""
        where = {"mean": "whole stream", "first": "its first tenth", "last": "its last tenth"}[at]
        return f"{metric.replace('_', ' ')}, {where}"

    def details(self, summary: dict[str, Any]) -> Details:
        """Accuracy by window, and what was adapted on how much."""
        points = [(number, float(value)) for number, value in enumerate(summary["curve"], start=1)]
        cost = {"trained parameters": summary["trained"], "images": summary["images"]}
        return Details({"accuracy": Curve("window of the stream", points)}, cost=cost)

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed's accuracy, curve and domains; intervals of whatever is known."""
        runs = results.runs[stream][variant]
        entry: dict[str, Any] = {
            "trained": runs[0]["trained"],
            "skipped": [run["skipped"] for run in runs],
            "domains": [{d: v["accuracy"] for d, v in run["domains"].items()} for run in runs],
            "curve": [[round(x, 4) for x in run["curve"]] for run in runs],
        }
        for metric in ("accuracy", "clean", "routing_gain", *EXPERTS):
            for at in ("first", "last", "mean"):
                values = results.values(stream, variant, metric, at)
                if not any(map(math.isnan, values)):
                    entry[f"{metric}_{at}"] = three(confidence_interval(values, "mean"))
        return entry

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Per stream: each variant's accuracy, and what it is above the source along the stream."""
        figure = new_figure(title, 3.6 * len(results.streams))
        grid = figure.subplots(len(results.streams), 2, squeeze=False)
        for stream, (left, right) in zip(results.streams, grid, strict=True):
            variants = results.runs[stream]
            dots(left, {v: results.interval(stream, v, "accuracy", "mean") for v in variants}, 100)
            left.set(title=stream, xlabel="accuracy (%)")
            source = "noadapt" if "noadapt" in variants else next(iter(variants))
            for number, (variant, runs) in enumerate(variants.items()):
                points = list(zip(*map(_gains, runs, variants[source]), strict=True))
                intervals = [confidence_interval(list(point), "mean") for point in points]
                band(right, range(1, len(points) + 1), intervals, number, variant, 100)
            right.set(title=stream, xlabel="window of the stream",
                      ylabel=f"accuracy so far minus {source}'s (points)")  # fmt: skip
        save(figure, path)

    def title(self, config: Config, shared: Shared) -> str:
        """Data, order and severity."""
        return f"{shared.source.name}, {config.order} order, severity {config.severity}"

    def report_folder(self, preset: str, config: RunConfig, first: Path) -> Path:
        """One folder for all methods and streams."""
        return Path(config.runs_dir) / "tta" / (config.name or preset)

    def report_more(self, folder: Path, config: Config, shared: Shared, results: Results) -> None:
        """Domains, experts, routings, and how far the domains' gradients agree."""
        title, stream = self.title(config, shared), config.streams[-1]
        experts_figure(folder / "experts.png", results.runs[stream], f"{title}: {stream}")
        print_domains(stream, results.runs[stream], config.seeds)
        print_routings(results.runs, config.routing_batches)
        if config.alignment and len(STREAMS[stream]) > 1:
            cosines = domain_alignment(config, shared.source, copy.deepcopy(shared.model))
            write_json(folder / "alignment.json", cosines)
            pairs = [row[b] for a, row in cosines.items() for b in row if a != b]
            print(f"gradients of {stream}'s domains at the source model: mean cosine "
                  f"{sum(pairs) / len(pairs):.2f}, least {min(pairs):.2f}")  # fmt: skip
        runs = [
            run for variants in results.runs.values() for own in variants.values() for run in own
        ]
        skipped = sum(run["skipped"] for run in runs)
        if skipped:
            print(f"batches not learnt from, because their loss was not finite: {skipped}")


class StreamSession(Session):
    """One method along one stream."""

    def __init__(self, run: Run, config: Config, source: ShiftSource, model: nn.Module) -> None:
        self.run, self.config, self.source = run, config, source
        self.stream, self.adapter = shifted(config, source), make_adapter(config, model)
        self.model = self.adapter
        self.tally = Tally(self.stream.names, config.window)
        self.history: list[dict[str, Any]] = []
        self.done = 0
        self.recorder = Recorder(
            run, f"{config.method.part.name}, {config.streams[0]}", len(self.stream), self.state
        )
        if run.restored is None and self.adapter.source_images:
            count = self.adapter.source_images
            self.adapter.observe_source(_source_batches(config, source, count, run.device))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a batch."""
        self.done, self.history = state["batch"], state["history"]
        self.tally.load_state_dict(state["tally"])
        self.adapter.load_state_dict(state["adapter"])
        self.recorder.progress.start_at(self.done)

    def work(self) -> None:
        """All batches that are left."""
        for number in range(self.done, len(self.stream)):
            batch = self.stream.batch(number)
            logits = self.adapter(self._images(batch.images))
            self.done = number + 1
            if self.tally.add(logits, batch.labels, batch.domains):
                self.history.append(self._log())
            self.recorder.step_done(self.done, lambda: {"accuracy": self.tally.accuracy})

    def state(self) -> dict[str, Any]:
        """After the latest batch."""
        return {
            "batch": self.done, "tally": self.tally.state_dict(), "history": self.history,
            "adapter": dict(self.adapter.state_dict()),
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Accuracy in all, by window and by domain; use of the experts; the routing compared."""
        config, adapter, tally = self.config, self.adapter, self.tally
        routings = self._routings()
        trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        return {
            "method": config.method.part.name, "data": self.source.name,
            "stream": config.streams[0], "order": config.order, "seed": config.seed,
            "images": self.stream.num_images, "accuracy": tally.accuracy,
            "domains": tally.domains(), "curve": tally.curve, "steps": adapter.steps,
            "skipped": adapter.skipped, "trained": trained, "history": self.history,
            "routings": routings,
        }  # fmt: skip

    def _routings(self) -> dict[str, dict[str, float]]:
        """`usefulness` on the stream's last batches, at the weights that the stream has left."""
        stream, count = self.stream, self.config.routing_batches
        if not count:
            return {}

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(max(len(stream) - count, 0), len(stream)):
                batch = stream.batch(number)
                yield self._images(batch.images), batch.labels.to(self.run.device)

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

    def _images(self, images: Tensor) -> Tensor:
        """Input of the model, on the run's device."""
        return normalise(images.to(self.run.device), self.source.mean, self.source.std)


def _check_batches(adapter: Adapter, config: Config, streams: list[Stream]) -> None:
    """Refuse batches of one image, be it the last of a stream, where the method needs two."""
    for name, stream in zip(config.streams, streams, strict=True):
        if adapter.by_batch and stream.smallest_batch == 1:
            raise UserError(
                f"{adapter.name} with this model normalises by the batch, which needs at least 2 "
                f"images, and a batch of the stream {name} has 1; use another --batch-size (now "
                f"{config.batch_size}) or --limit, or a model without BatchNorm"
            )


def _fitted(config: Config, classes: int) -> Config:
    """The settings with the method's options that follow the number of classes."""
    return replace(config, method=for_classes(config.method, classes))


def domain_alignment(
    config: Config, source: ShiftSource, model: nn.Module
) -> dict[str, dict[str, float]]:
    """Cosines between the gradients of the last stream's domains at the trained model, by name."""
    device, size = resolve(config.device), config.batch_size
    make_deterministic(device)
    model = model.to(device)
    stream = make_stream(source, config.streams[-1], "sequential", config.severity, size,
                         config.seed, config.alignment * size)  # fmt: skip
    ends = list(itertools.accumulate(-(-len(s.indices) // size) for s in stream.segments))

    def batches(first: int, end: int) -> Iterator[Tensor]:
        for number in range(first, end):
            images = stream.batch(number).images.to(device)
            yield normalise(images, source.mean, source.std)

    pairs = zip(stream.names, [0, *ends], ends, strict=False)
    cosines = alignment(model, {name: batches(first, end) for name, first, end in pairs}).tolist()
    return {name: dict(zip(stream.names, row, strict=True))
            for name, row in zip(stream.names, cosines, strict=True)}  # fmt: skip


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


def _gains(run: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Up to each window, the mean accuracy of a run minus that of another on the same images.

    The windows' accuracies themselves mostly tell which images were in them.
    """
    gaps = [a - b for a, b in zip(run["curve"], other["curve"], strict=True)]
    return [total / count for count, total in enumerate(accumulate(gaps), 1)]


def _part(values: list[float], at: At) -> float:
    """Mean over the first or the last tenth of the values, or all; nan if there are none."""
    tenth = max(len(values) // 10, 1)
    part = {"first": values[:tenth], "last": values[-tenth:], "mean": values}[at]
    return sum(part) / len(part) if part else math.nan


def _number(value: Any) -> float:
    """A logged number; of one per layer, the mean over layers that have it; nan for none."""
    known = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    return sum(known) / len(known) if known else math.nan

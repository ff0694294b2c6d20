"""Test-time adaptation: methods along streams of shifted images."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cl_benchmarks.shifts.folders import FolderShifts
from cl_benchmarks.shifts.stream import Stream, domains_of
from dynmoe.errors import UserError
from dynmoe.experiments.tta.costs import print_costs
from dynmoe.experiments.tta.exporting import AdapterExporter
from dynmoe.experiments.tta.figures import (
    comparison_figure,
    depth_profile,
    experts_figure,
    print_depth,
    print_domains,
    print_routings,
)
from dynmoe.experiments.tta.gates import LEAST, gate_value, report_gates
from dynmoe.experiments.tta.gates import METRICS as COLUMNS
from dynmoe.experiments.tta.presets import presets
from dynmoe.experiments.tta.session import StreamSession, make_adapter, shifted
from dynmoe.experiments.tta.settings import Config, check_streams, parse_variant
from dynmoe.experiments.tta.source_model import Shared, make_source
from dynmoe.lab import cache, inputs
from dynmoe.lab.config import RunConfig
from dynmoe.lab.experiment import At, Curve, Details, Experiment, Results
from dynmoe.lab.export import Exporter
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import confidence_interval, three
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.options import FEW, for_classes, for_stream
from dynmoe.tta.params import UnfitModelError

EXPERTS = ("balance", "largest_share", "used_experts", "router_entropy", "similarity")
"""Metrics of the experts' history; none for methods without experts."""
CALIBRATION = ("ece", "adaptive_ece")
"""Metrics of how far confidence and accuracy are apart, over the whole stream."""


@dataclass(frozen=True)
class TestTimeAdaptation(Experiment):
    """What `dynmoe.tta` does: one run is one method along one stream.

    Metrics: `accuracy`; `clean`, that of the clean images in the stream; `routing_gain`, accuracy
    under the learned routing minus that under a random one; those in `CALIBRATION`, and those in
    `EXPERTS`. `at` is the stream's first tenth, its last tenth, or all of it.
    """

    __test__ = False  # pytest reads the name as that of a test

    command = "tta"
    least: ClassVar[dict[str, float]] = {
        "batch_size": 1,
        "window": 1,
        "lr_scale": 0.0,
        "routing_batches": 0,
        "gates": 0,
        "clean_every": 0,
        "clean_images": 1,
    }
    metric = "accuracy"
    at = "mean"
    span = "first to last tenth of the stream"
    columns = (
        ("accuracy", "accuracy", "mean"),
        ("last tenth", "accuracy", "last"),
        ("clean images", "clean", "mean"),
        ("clean, held out, at the end", "held_out", "last"),
        ("ECE", "ece", "mean"),
        ("ECE, ad.", "adaptive_ece", "mean"),
        ("most loaded expert", "largest_share", "last"),
        ("router entropy", "router_entropy", "last"),
        ("likeness of experts", "similarity", "last"),
        ("learned - random routing", "routing_gain", "mean"),
    )
    lesser = tuple(heading for heading, _, _ in columns[1:])
    legend = "ECE, ad.: with adaptive bins"
    references = ("noadapt", "tent")
    about = ("data", "streams", "order", "severity", "limit")

    def check(self, config: Config) -> None:
        """Also the streams' names, and the variants' options before a model is made."""
        super().check(config)
        for stream in config.streams:
            domains_of(stream)
        if not config.streams or len(set(config.streams)) < len(config.streams):
            raise UserError("--streams needs one or more streams, each named once")
        if 0 < config.gates < LEAST:
            raise UserError(f"--gates {config.gates} is too small; use 0 or at least {LEAST}")
        check_streams(config)
        for text in self._compared(config):
            parse_variant(text, FEW)  # what follows the classes is filled in later

    def settle(self, config: Config) -> Config:
        """With the method's options that follow the number of classes and the stream."""
        fitted = _fitted(config, make_source(config)[0].num_classes)
        return replace(fitted, method=for_stream(fitted.method, config.streams[0]))

    def variants(self, config: Config, shared: Shared) -> dict[str, dict[str, Config]]:
        """On every stream the method itself, then those compared with.

        Raises:
            UserError: a variant that cannot be read, is named twice, or cannot work.
        """
        own, classes = config.method.part.name, shared.source.num_classes
        texts = self._compared(config)
        methods = {text: parse_variant(text, classes) for text in texts}
        found = {own: _fitted(config, classes)}
        found |= {label: replace(config, method=method) for label, method in methods.items()}
        streams = [shifted(replace(config, streams=(s,)), shared.source) for s in config.streams]
        _check_methods(found, shared, config, streams)  # what cannot work shows now

        def trial(label: str, one: Config, stream: str) -> Config:
            name = f"{config.name}-{safe(label)}-{safe(stream)}" if config.name else None
            method = for_stream(one.method, stream)
            return replace(
                one, method=method, compare=(), streams=(stream,), name=name, resume=True
            )

        return {s: {label: trial(label, one, s) for label, one in found.items()}
                for s in config.streams}  # fmt: skip

    def _compared(self, config: Config) -> list[str]:
        """The variants beside the method itself; by default it is left out of them."""
        own = config.method.part.name
        texts = [t for t in config.compare if config.compare != Config.compare or t != own]
        if len({own, *texts}) < 1 + len(texts):
            raise UserError(
                f"--compare {' '.join(texts)}: a method is named twice ({own} runs anyway)"
            )
        return texts

    def label(self, config: Config, shared: Shared) -> str:
        """Method and stream."""
        return f"{config.method.part.name}-{safe(config.streams[0])}"

    def load(self, config: Config) -> Shared:
        """The images and the trained model."""
        return make_source(config)

    def inputs(self, config: Config, shared: Shared) -> dict[str, str]:
        """Weights, and the clean images of class folders."""
        found = inputs.weights(config.weights)
        if isinstance(shared.source, FolderShifts):
            images = shared.source.images
            found |= inputs.images(images.name, config.data_dir, images.files)
        return found

    def prepare(self, run: Run, config: Config, shared: Shared) -> StreamSession:
        """The stream, and the method around a copy of the model."""
        return StreamSession(run, config, shared.source, copy.deepcopy(shared.model).to(run.device))

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """A number of the run, nan where it has none."""
        if metric == "accuracy":
            return summary["accuracy"] if at == "mean" else _part(summary["curve"], at)
        if metric == "clean":
            return summary["domains"].get("clean", {}).get("accuracy", math.nan)
        if metric.startswith("gate_"):
            return gate_value(summary.get("gates", {}), metric)
        if metric == "held_out":
            return _part([value for _, value in summary.get("forgetting", [])], at)
        if metric in CALIBRATION:
            return _number(summary.get("calibration", {}).get(metric))
        if metric == "routing_gain":
            found = summary["routings"]
            return found["learned"]["accuracy"] - found["random"]["accuracy"] if found else math.nan
        return _part([_number(point.get(metric)) for point in summary["history"]], at)

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Accuracies and shares in points; entropy and cosines as they are."""
        if metric in (*EXPERTS[2:], "balance", "gate_alignment") or "cosine" in metric:
            return 1.0, "", 2
        return super().unit(metric)

    def describe(self, metric: str, at: At) -> str:
        """Such as "accuracy, whole stream"."""
        where = {"mean": "whole stream", "first": "its first tenth", "last": "its last tenth"}[at]
        return f"{metric.replace('_', ' ')}, {where}"

    def details(self, summary: dict[str, Any]) -> Details:
        """Accuracy by window, and what was adapted on how much."""
        points = [(float(n), float(value)) for n, value in enumerate(summary["curve"], start=1)]
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
        entry["options"] = runs[0].get("options", {})
        entry["similarity_by_depth"] = depth_profile(runs)
        gates = [f"gate_{name}" for name in ("positive", "gain", "headroom", "alignment", *COLUMNS)]
        for metric in gates:
            values = results.values(stream, variant, metric, "mean")
            if not any(map(math.isnan, values)):
                entry[metric] = three(confidence_interval(values, "mean"))
        for metric in ("accuracy", "clean", "held_out", "routing_gain", *CALIBRATION, *EXPERTS):
            for at in ("first", "last", "mean"):
                values = results.values(stream, variant, metric, at)
                if not any(map(math.isnan, values)):
                    entry[f"{metric}_{at}"] = three(confidence_interval(values, "mean"))
        return entry

    def summaries(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Curve and accuracy of each seed: all domains of a stream have as many images."""
        seeds = zip(entry["curve"], entry["domains"], strict=True)
        return [{"curve": c, "accuracy": sum(d.values()) / len(d)} for c, d in seeds]

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Per stream: each variant's accuracy, and what it is above the source along the stream."""
        comparison_figure(path, results, title)

    def exporter(self) -> Exporter:
        """The method and its model after the stream, where the run has kept them."""
        return AdapterExporter()

    def chance(self, config: Config, shared: Shared) -> float:
        """One in as many as the data have classes."""
        return 1 / shared.source.num_classes

    def title(self, config: Config, shared: Shared) -> str:
        """Data, order and severity."""
        return f"{shared.source.name}, {config.order} order, severity {config.severity}"

    def report_folder(self, preset: str, config: RunConfig, first: Path) -> Path:
        """One folder for all methods and streams of a command line.

        Methods, streams and paths stand in no preset's name; where they are not the preset's own, a
        digest of them tells one comparison from another.
        """
        begins = [base for name, base in presets().items() if name.startswith(preset.split("-")[0])]
        same = _compared_in(config) in map(_compared_in, begins)
        name = preset if same else f"{preset}-{cache.digest(_compared_in(config))[:8]}"
        return Path(config.runs_dir) / "tta" / (config.name or name)

    def report_more(self, folder: Path, config: Config, shared: Shared, results: Results) -> None:
        """Domains, experts, routings, gates, costs."""
        title, stream = self.title(config, shared), config.streams[-1]
        experts_figure(folder / "experts.png", results.runs[stream], f"{title}: {stream}")
        print_domains(stream, results.runs[stream], config.seeds)
        print_routings(results.runs, config.routing_batches)
        report_gates(folder, results.runs)
        print_depth(stream, results.runs[stream])
        print_costs(results.runs, results.folders)
        runs = [
            run for variants in results.runs.values() for own in variants.values() for run in own
        ]
        skipped = sum(run["skipped"] for run in runs)
        if skipped:
            print(f"batches not learnt from, because their loss was not finite: {skipped}")


def _check_methods(
    found: dict[str, Config], shared: Shared, config: Config, streams: list[Stream]
) -> None:
    """Refuse methods that cannot adapt the model; the line names those that can.

    Raises:
        UserError: there is one, or one that does not suit the images.
    """
    fit, unfit = [], None
    for label, one in found.items():
        methods: list[PartConfig] = []  # on most streams one has the same options
        for stream in config.streams:
            if (method := for_stream(one.method, stream)) not in methods:
                methods.append(method)
        try:
            for method in methods:
                adapter = make_adapter(replace(one, method=method), copy.deepcopy(shared.model))
                adapter.check_side(shared.source.size)
                _check_batches(adapter, config, streams)
            fit.append(label)
        except UnfitModelError as error:
            unfit = unfit or error
    if unfit and fit:
        first, *others = sorted(fit, key="noadapt".__eq__)
        raise UserError(f"{unfit}. What fits: --method {first} --compare {' '.join(others)}")
    if unfit:
        raise unfit


def _check_batches(adapter: Adapter, config: Config, streams: list[Stream]) -> None:
    """Refuse batches of one image, be it the last of a stream, where the method needs two."""
    for name, stream in zip(config.streams, streams, strict=True):
        if adapter.by_batch and stream.smallest_batch == 1:
            raise UserError(
                f"{adapter.name} with this model normalises by the batch, which needs at least 2 "
                f"images, and a batch of the stream {name} has 1; use another --batch-size (now "
                f"{config.batch_size}) or --limit, or a model without BatchNorm"
            )


def _compared_in(config: Any) -> dict[str, Any]:
    """What tells comparisons apart beside the settings that a folder's name begins with."""
    paths = {n: str(v) for n, v in vars(config).items() if isinstance(v, Path) and n != "runs_dir"}
    method = {"method": config.method.part.name, **asdict(config.method)}
    return {"data": config.data, "streams": config.streams, "compare": config.compare} | {
        "method": method,
        "paths": paths,
    }


def _fitted(config: Config, classes: int) -> Config:
    """The settings with the method's options that follow the number of classes."""
    return replace(config, method=for_classes(config.method, classes))


def safe(text: str) -> str:
    """A label as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "+._-" else "-" for c in text)


def _part(values: list[float], at: At) -> float:
    """Mean over the first or the last tenth of the values, or all; nan if there are none."""
    tenth = max(len(values) // 10, 1)
    part = {"first": values[:tenth], "last": values[-tenth:], "mean": values}[at]
    return sum(part) / len(part) if part else math.nan


def _number(value: Any) -> float:
    """A logged number; of one per layer, the mean over layers that have it; nan for none."""
    known = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    return sum(known) / len(known) if known else math.nan

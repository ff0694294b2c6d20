"""Runs of `dynmoe.tta`: one method of test-time adaptation along one stream."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.lab.config import digest, parse
from dynmoe.lab.jobs import Job
from dynmoe.lab.statistics import confidence_interval
from dynmoe.studies.views.drawing import band, dots, new_figure, save
from dynmoe.studies.views.view import At, View, three

if TYPE_CHECKING:
    from dynmoe.studies.design import Results

EXPERTS = ("balance", "largest_share", "used_experts", "router_entropy", "similarity")
"""Metrics of the experts' history; none for methods without experts."""


class Shifts(View):
    """Test-time adaptation. A stream's flags name one stream, a variant's flags one method.

    Metrics: `accuracy`; `clean`, that of the clean images in the stream; `routing_gain`, accuracy
    under the learned routing minus that under a random one; and those in `EXPERTS`. `at` is the
    stream's first tenth, its last tenth, or all of it.
    """

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

    def jobs(self, argv: list[str], seeds: list[int], runs_dir: Path, label: str) -> list[Job]:
        """Runs in `runs_dir/tta/studies`."""
        from dynmoe.experiments.tta.experiment import check, fitted, job_of, make_source
        from dynmoe.tta.__main__ import presets

        preset, config = parse(presets(), [*argv, "--allow-unused"], "python -m dynmoe.tta", "")
        check(config)
        config = fitted(config, make_source(config)[0].num_classes)
        name = f"studies/{config.method.part.name}-{digest(config)}"
        found = [replace(config, seed=seed, name=name, runs_dir=runs_dir, resume=True)
                 for seed in seeds]  # fmt: skip
        return [job_of(preset, label, one) for one in found]

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
        """Per stream: each variant's accuracy, and what it is above the first along the stream."""
        figure = new_figure(title, 3.6 * len(results.streams))
        grid = figure.subplots(len(results.streams), 2, squeeze=False)
        for stream, (left, right) in zip(results.streams, grid, strict=True):
            variants = results.runs[stream]
            dots(left, {v: results.interval(stream, v, "accuracy", "mean") for v in variants}, 100)
            left.set(title=stream, xlabel="accuracy (%)")
            first = next(iter(variants))  # the source, in our own studies
            for number, (variant, runs) in enumerate(variants.items()):
                points = list(zip(*map(_gains, runs, variants[first]), strict=True))
                intervals = [confidence_interval(list(point), "mean") for point in points]
                band(right, range(1, len(points) + 1), intervals, number, variant, 100)
            right.set(title=stream, xlabel="window of the stream",
                      ylabel=f"accuracy so far minus {first}'s (points)")  # fmt: skip
        save(figure, path)


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

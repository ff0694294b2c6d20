"""Runs of `dynmoe.dg`: one method in one trial, every domain left out in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.lab.config import digest, parse
from dynmoe.lab.jobs import Job
from dynmoe.lab.statistics import confidence_interval
from dynmoe.studies.views.drawing import COLORS, dots, new_figure, save
from dynmoe.studies.views.view import At, View, three

if TYPE_CHECKING:
    from dynmoe.studies.design import Results


class Domains(View):
    """Domain generalisation. A variant's flags name one method.

    Metrics, as means over the left-out domains: `accuracy`, at the selected evaluation;
    `oracle_accuracy`, at the last one; `trainable`, the trainable parameters; and the method's own
    `measures`, of MoE² those of `dynmoe.dg.methods.moe2.departure`.
    """

    metric = "accuracy"
    columns = (
        ("accuracy", "accuracy", "mean"),
        ("last evaluation", "oracle_accuracy", "mean"),
        ("trainable parameters", "trainable", "mean"),
    )
    references = ("linear-probe", "moa")
    at = "mean"

    def jobs(self, argv: list[str], seeds: list[int], runs_dir: Path, label: str) -> list[Job]:
        """Runs in `runs_dir/dg/studies`."""
        from dynmoe.dg.__main__ import presets
        from dynmoe.experiments.dg.experiment import check, job_of

        preset, config = parse(presets(), [*argv, "--allow-unused"], "python -m dynmoe.dg", "")
        check(config)
        name = f"studies/{config.method.part.name}-{digest(config)}"
        found = [replace(config, seed=seed, name=name, runs_dir=runs_dir, resume=True)
                 for seed in seeds]  # fmt: skip
        return [replace(job_of(preset, one), label=f"{label}, seed {one.seed}") for one in found]

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """Mean over the left-out domains."""
        values = [{**row, **row["measures"]}[metric] for row in summary["tests"]]
        return sum(values) / len(values)

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Accuracies in points."""
        return (1.0, "", 0) if metric == "trainable" else super().unit(metric)

    def describe(self, metric: str, at: At) -> str:
        """A mean over domains."""
        return f"{metric.replace('_', ' ')}, mean over left-out domains"

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed's accuracy on each left-out domain, and intervals."""
        runs = results.runs[stream][variant]
        entry: dict[str, Any] = {
            "trainable": runs[0]["tests"][0]["trainable"],
            "parameters": runs[0]["tests"][0]["parameters"],
            "domains": {
                row["domain"]: [run["tests"][place]["accuracy"] for run in runs]
                for place, row in enumerate(runs[0]["tests"])
            },
            "growths": [sum(len(row["growth"]) for row in run["tests"]) for run in runs],
        }
        for metric in ("accuracy", "oracle_accuracy"):
            values = results.values(stream, variant, metric)
            entry[metric] = three(confidence_interval(values, "mean"))
        return entry

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Per stream: accuracy with its interval by variant, and against what learns."""
        figure = new_figure(title, 4.0 * len(results.streams))
        grid = figure.subplots(len(results.streams), 2, squeeze=False)
        for stream, (left, right) in zip(results.streams, grid, strict=True):
            rows = {v: results.interval(stream, v) for v in results.runs[stream]}
            dots(left, rows, 100)
            left.set(title=stream, xlabel="accuracy on left-out domains (%)")
            for number, (variant, interval) in enumerate(rows.items()):
                trainable = results.values(stream, variant, "trainable")[0]
                color = COLORS[number % len(COLORS)]
                right.plot([trainable], [100 * interval.point], "o", color=color)
                right.annotate(variant, (trainable, 100 * interval.point), fontsize=8,
                               xytext=(4, 3), textcoords="offset points")  # fmt: skip
            right.set(title=stream, xlabel="trainable parameters", xscale="log",
                      ylabel="accuracy on left-out domains (%)")  # fmt: skip
        save(figure, path)

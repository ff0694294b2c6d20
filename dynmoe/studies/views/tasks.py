"""Runs of `dynmoe.cl`: accuracies at the end of each task of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.lab.jobs import Job
from dynmoe.lab.statistics import confidence_interval, iqm
from dynmoe.studies.views.drawing import band, dots, new_figure, save
from dynmoe.studies.views.view import At, View, named_jobs, three

if TYPE_CHECKING:
    from dynmoe.studies.design import Results

PANELS = (("train_accuracy", "train accuracy at task end"), ("online_accuracy", "online accuracy"),
          ("test_accuracy", "test accuracy at task end"))  # fmt: skip


MOST_CURVES = 12
"""Variants that one panel shows as curves."""


class Tasks(View):
    """Continual learning. Metrics are fields of a summary's task rows."""

    metric = "train_accuracy"
    columns = (
        ("first task", "train_accuracy", "first"),
        ("last task", "train_accuracy", "last"),
        ("mean", "train_accuracy", "mean"),
        ("online, mean", "online_accuracy", "mean"),
        ("test, mean", "test_accuracy", "mean"),
    )
    references = ("dense", "fresh")

    def jobs(self, argv: list[str], seeds: list[int], runs_dir: Path, label: str) -> list[Job]:
        """Runs in `runs_dir/cl/studies`."""
        from dynmoe.cl import presets

        return named_jobs("cl", presets(), argv, seeds, runs_dir, label)

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """Of the first or the last task, or the mean over tasks."""
        values = [task[metric] for task in summary["tasks"]]
        return {"first": values[0], "last": values[-1], "mean": sum(values) / len(values)}[at]

    def describe(self, metric: str, at: At) -> str:
        """Such as "train accuracy, last task"."""
        return f"{metric.replace('_', ' ')}, {'mean over tasks' if at == 'mean' else f'{at} task'}"

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed and task, intervals at the stream's ends and over all, logged tags."""
        last = results.runs[stream][variant][0]["tasks"][-1]
        entry: dict[str, Any] = {"parameters": last["parameters"]}
        for metric, _ in PANELS:
            tasks = results.tasks(stream, variant, metric)
            entry[metric] = [[round(x, 4) for x in seed] for seed in tasks]
            # The tasks of a run are not independent: its own IQM is one value.
            entry[f"{metric}_iqm"] = three(confidence_interval([iqm(t) for t in tasks], "mean"))
            for at in ("first", "last", "mean"):
                entry[f"{metric}_{at}"] = three(results.interval(stream, variant, metric, at))
        return entry

    def draw(self, path: Path, results: Results, title: str) -> None:
        """A row of panels per stream: train, online and test accuracy over the tasks.

        With more variants than curves can be told apart: their means over the tasks.
        """
        if any(len(variants) > MOST_CURVES for variants in results.runs.values()):
            _draw_means(path, results, title)
            return
        figure = new_figure(title, 3.6 * len(results.streams))
        grid = figure.subplots(len(results.streams), len(PANELS), squeeze=False)
        for stream, row in zip(results.streams, grid, strict=True):
            for axes, (metric, label) in zip(row, PANELS, strict=True):
                for number, variant in enumerate(results.runs[stream]):
                    by_task = list(zip(*results.tasks(stream, variant, metric), strict=True))
                    intervals = [confidence_interval(list(task), "mean") for task in by_task]
                    band(axes, range(1, len(by_task) + 1), intervals, number, variant, 100)
                axes.set(title=stream, xlabel="task", ylabel=f"{label} (%)", ylim=(0, 103))
        save(figure, path)


def _draw_means(path: Path, results: Results, title: str) -> None:
    """The same panels with a row per variant, and lines at the reference networks."""
    most = max(len(variants) for variants in results.runs.values())
    figure = new_figure(title, (1 + 0.2 * most) * len(results.streams))
    grid = figure.subplots(len(results.streams), len(PANELS), squeeze=False)
    for stream, row in zip(results.streams, grid, strict=True):
        for axes, (metric, label) in zip(row, PANELS, strict=True):
            rows = {v: results.interval(stream, v, metric, "mean") for v in results.runs[stream]}
            dots(axes, rows, 100)
            for reference in Tasks.references:
                axes.axvline(100 * rows[reference].point, color="#8a8a8a", linestyle=":")
            axes.set(title=stream, xlabel=f"{label}, mean (%)")
    save(figure, path)

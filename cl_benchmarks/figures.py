"""The figures of continual learning: accuracies over the tasks, a row of panels per stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynmoe.lab.experiment import Results
from dynmoe.lab.figures import band, chance_line, dots, looks, new_figure, save
from dynmoe.lab.statistics import confidence_interval

PANELS = (("train_accuracy", "train accuracy at task end"), ("online_accuracy", "online accuracy"),
          ("test_accuracy", "test accuracy at task end"))  # fmt: skip
OLD = ("old_accuracy", "test accuracy on earlier tasks")
"""A panel more, in figures of runs that have asked about old tasks."""
MOST_CURVES = 12
"""Variants that one panel shows as curves."""


def draw(path: Path, results: Results, title: str, references: tuple[str, ...]) -> None:
    """A row of panels per stream: train, online and test accuracy, and that on earlier tasks.

    With more variants than curves can be told apart: their means over the tasks, and lines at
    the `references`.
    """
    most = max(map(len, results.runs.values()))
    curves = most <= MOST_CURVES
    asked = [stream for stream in results.streams if has_old(results, stream)]
    panels = (*PANELS, OLD) if asked else PANELS
    height = (3.6 if curves else 1 + 0.2 * most) * len(results.streams)
    figure = new_figure(title, height, 13 * len(panels) / len(PANELS))
    grid = figure.subplots(len(results.streams), len(panels), squeeze=False)
    for stream, row in zip(results.streams, grid, strict=True):
        for axes, (metric, label) in zip(row, panels, strict=True):
            if metric == OLD[0] and stream not in asked:
                axes.set_visible(False)
                continue
            axes.set_title(stream)
            if curves:
                draw_curves(axes, results, stream, metric, label)
            else:
                _draw_means(axes, results, stream, metric, label, references)
            chance_line(axes, results.chance.get(stream), across=not curves)
    save(figure, path)


def from_entry(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What figures read of the summaries, one a seed, from a variant's numbers in results.json.

    Raises:
        KeyError: there is a panel's metric missing.
    """
    metrics = [*(metric for metric, _ in PANELS), *([OLD[0]] if OLD[0] in entry else [])]
    by_seed = zip(*(entry[metric] for metric in metrics), strict=True)
    return [
        {"tasks": [dict(zip(metrics, row, strict=True)) for row in zip(*seed, strict=True)]}
        for seed in by_seed
    ]


def tasks_of(results: Results, stream: str, variant: str, metric: str) -> list[list[Any]]:
    """[S][T] of a field of the summaries' task rows, such as `train_accuracy`; None for gaps."""
    return [[task.get(metric) for task in run["tasks"]] for run in results.runs[stream][variant]]


def has_old(results: Results, stream: str) -> bool:
    """Whether all runs on a stream were asked about old tasks."""
    runs = [run for runs in results.runs[stream].values() for run in runs]
    return all(run["tasks"][-1].get(OLD[0]) is not None for run in runs)


def draw_curves(axes: Any, results: Results, stream: str, metric: str, label: str) -> None:
    """A curve over the tasks per variant."""
    for variant in results.runs[stream]:
        look = looks(results.variants)[variant]
        by_task = list(zip(*tasks_of(results, stream, variant, metric), strict=True))
        known = [t for t, values in enumerate(by_task, start=1) if None not in values]
        intervals = [confidence_interval(list(by_task[t - 1]), "mean") for t in known]
        band(axes, known, intervals, look, variant, 100)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="task", ylabel=f"{label} (%)", ylim=(0, 103))


def _draw_means(
    axes: Any, results: Results, stream: str, metric: str, label: str, references: tuple[str, ...]
) -> None:
    """A row per variant."""
    rows = {v: results.interval(stream, v, metric, "mean") for v in results.runs[stream]}
    dots(axes, rows, 100)
    for reference in references:
        if reference in rows:
            axes.axvline(100 * rows[reference].point, color="#8a8a8a", linestyle=":")
    axes.set(xlabel=f"{label},\nmean (%)")

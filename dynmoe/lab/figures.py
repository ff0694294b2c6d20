"""Figures of finished runs, as PNG files. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynmoe.lab.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#222222", "#8a8a8a", "#e29a2d", "#7fc8f8", "#1b6ca8", "#5b3a8c", "#f4a9a8", "#d1495b",
          "#7d1d3f", "#5c946e")  # fmt: skip
"""One per curve, in order; curves after these take them again, dashed."""
PANELS = (
    ("train_accuracy", "train accuracy at task end"),
    ("online_accuracy", "online accuracy"),
    ("test_accuracy", "test accuracy at task end"),
)


def as_image(figure: Figure) -> NDArray[np.uint8]:
    """A figure as uint8 [H, W, 3], as TensorBoard's add_image takes it (dataformats="HWC")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def plasticity_figure(path: Path, curves: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Draw trainability, online and test accuracy over the tasks, one line per method.

    Args:
        path: the PNG file, written atomically.
        curves: method name -> the `tasks` of its summary.
        title: data set, protocol and network: what the numbers are about.
    """
    series = {
        name: {key: [[task[key] for task in tasks]] for key, _ in PANELS}
        for name, tasks in curves.items()
    }
    _draw(path, series, title)


def band_figure(path: Path, results: dict[str, Any], title: str) -> None:
    """The same over several seeds: the mean, and a band of its 95 % t interval.

    Args:
        path: the PNG file, written atomically.
        results: what `dynmoe.sweep` writes; per variant and metric [seeds][tasks] shares in 0..1.
        title: what the numbers are about.
    """
    _draw(path, results["variants"], f"{title} ({results['seeds']} seeds)")


def _draw(path: Path, series: dict[str, dict[str, Any]], title: str) -> None:
    """series: name -> metric -> [seeds][tasks] accuracies as shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dynmoe.lab.statistics import confidence_interval

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, (name, metrics) in enumerate(series.items()):
            by_task = [[100 * x for x in task] for task in zip(*metrics[key], strict=True)]
            color, x = COLORS[number % len(COLORS)], range(1, len(by_task) + 1)
            line = "--" if number >= len(COLORS) else "-"
            intervals = [confidence_interval(task, "mean") for task in by_task]
            mean = [i.point for i in intervals]
            axes.plot(x, mean, line, marker="o", markersize=3.5, color=color, label=name)
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel="task", ylabel=f"{label} (%)", ylim=(0, 103))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, fontsize=9,
                  loc="outside right upper")  # fmt: skip
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, buffer.getvalue())

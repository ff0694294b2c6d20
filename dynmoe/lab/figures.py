"""Figures as PNG files and for TensorBoard. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynmoe.lab.files import write_atomic
from dynmoe.lab.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#222222", "#8a8a8a", "#e29a2d", "#7fc8f8", "#1b6ca8", "#5b3a8c", "#f4a9a8", "#d1495b",
          "#7d1d3f", "#5c946e")  # fmt: skip
"""One per curve, in order; curves after these take them again, dashed."""


def as_image(figure: Figure) -> NDArray[np.uint8]:
    """A figure as uint8 [H, W, 3], as TensorBoard's add_image takes it (dataformats="HWC")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def new_figure(title: str, height: float, width: float = 13) -> Any:
    """An empty matplotlib figure of these inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def band(
    axes: Any, x: Sequence[float], intervals: list[Interval], number: int, label: str, factor: float
) -> None:
    """A line, and the band of its intervals; curves after the last color are dashed.

    Args:
        axes: to draw on.
        x: one place per interval.
        intervals: means with their ends.
        number: of the curve; gives its color.
        label: in the legend.
        factor: multiplies the values.
    """
    color, style = COLORS[number % len(COLORS)], "--" if number >= len(COLORS) else "-"
    point, low, high = (
        [factor * getattr(i, end) for i in intervals] for end in ("point", "low", "high")
    )
    axes.plot(x, point, style, marker="o", markersize=3, color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def dots(axes: Any, rows: dict[str, Interval], factor: float) -> None:
    """A row per variant: its mean, and a bar over its interval; first variant on top.

    Args:
        axes: to draw on.
        rows: variant -> mean with its interval.
        factor: multiplies the values.
    """
    for number, (place, interval) in enumerate(zip(range(len(rows), 0, -1), rows.values(),
                                                   strict=True)):  # fmt: skip
        point, low, high = (factor * x for x in interval)
        color = COLORS[number % len(COLORS)]
        if low == low:
            axes.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.5)
        axes.plot([point], [place], "o", color=color)
    axes.set_yticks(range(len(rows), 0, -1), list(rows))


def cross(axes: Any, x: Interval, y: Interval, number: int, label: str, factor: float) -> None:
    """A point, and a bar over its interval in each direction.

    Args:
        axes: to draw on.
        x, y: means with their ends.
        number: of the point; gives its color, and after the last color another mark.
        label: in the legend.
        factor: multiplies the values.
    """
    color, mark = COLORS[number % len(COLORS)], "s" if number >= len(COLORS) else "o"
    (across, left, right), (up, low, high) = ([factor * v for v in i] for i in (x, y))
    if left == left:
        axes.plot([left, right], [up, up], color=color, linewidth=2, alpha=0.5)
    if low == low:
        axes.plot([across, across], [low, high], color=color, linewidth=2, alpha=0.5)
    axes.plot([across], [up], mark, color=color, label=label)


def front(means: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points (x, y) that no other is above in both, from left to right."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(means, reverse=True):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found[::-1]


def finish(figure: Any) -> None:
    """The look of all figures; one legend for all panels if curves have labels."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right upper")


def save(figure: Any, path: Path) -> None:
    """Write the figure atomically, with one legend for all panels if curves have labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    finish(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba().tobytes())
    buffer = io.BytesIO()
    # Few colors make a quarter of the size, for figures that are kept in a repository.
    image.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())

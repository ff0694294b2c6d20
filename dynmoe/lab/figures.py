"""Figures as PNG files and for TensorBoard. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
"""Of methods, see `METHODS`; curves after these take them again, with other lines and marks."""
METHODS = {
    "dense": 0, "fresh": 1, "dynamicmoe": 4, "moe-static": 2, "reset-block": 7, "cbp": 5,
    "l2-init": 8, "redo": 9, "replay": 6, "g2": 4, "grow g2": 4,
    "DynamicMoE g2": 4,
    "noadapt": 0, "tent": 2, "eata": 5, "sar": 8, "deyo": 9, "cotta": 6, "becotta": 7, "moetta": 4,
    "linear-probe": 0, "erm": 1, "lora": 2, "kadaptation": 9, "moa": 7, "moe2": 4,
}  # fmt: skip
"""Method -> place of its color in COLORS, the same in all figures: the project's own are blue, what
they are measured against black or gray."""
LINES = ("-", "--", "-.", ":")
MARKS = "osD^vP*X<>"
"""Lines and marks tell curves apart where there are no colors, as in print."""
VECTORS: ContextVar[bool] = ContextVar("VECTORS", default=False)
"""Whether `save` writes a PDF and an SVG file beside each PNG file; a study sets it."""


@dataclass(frozen=True)
class Look:
    """Of a variant in a figure."""

    color: str
    line: str
    mark: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Each name's look: a known method's color is its own, others take what is left, in order."""
    names = list(dict.fromkeys(names))
    taken = {METHODS[name] % len(COLORS) for name in names if name in METHODS}
    free = [place for place in range(len(COLORS)) if place not in taken] or [*range(len(COLORS))]
    others = [name for name in names if name not in METHODS]
    places = METHODS | {name: free[i % len(free)] for i, name in enumerate(others)}
    return {
        name: Look(
            COLORS[places[name] % len(COLORS)],
            LINES[(number + number // len(COLORS)) % len(LINES)],
            MARKS[number % len(MARKS)],
        )
        for number, name in enumerate(names)
    }


def as_image(figure: Figure) -> NDArray[np.uint8]:
    """A figure as uint8 [H, W, 3], as TensorBoard's add_image takes it (dataformats="HWC")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    as_written(figure)
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
    axes: Any, x: Sequence[float], intervals: list[Interval], look: Look, label: str, factor: float
) -> None:
    """A line, and the band of its intervals.

    Args:
        axes: to draw on.
        x: one place per interval.
        intervals: means with their ends.
        look: of the curve, see `looks`.
        label: in the legend.
        factor: multiplies the values.
    """
    point, low, high = (
        [factor * getattr(i, end) for i in intervals] for end in ("point", "low", "high")
    )
    axes.plot(x, point, look.line, marker=look.mark, markersize=4, color=look.color, label=label)
    axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)


def dots(axes: Any, rows: dict[str, Interval], factor: float) -> None:
    """A row per variant: its mean, and a bar over its interval; the largest mean on top.

    Args:
        axes: to draw on.
        rows: variant -> mean with its interval.
        factor: multiplies the values.
    """
    own = looks(rows)
    ranked = sorted(rows, key=lambda name: _or_least(rows[name].point), reverse=True)
    places = range(len(rows), 0, -1)
    for name, place in zip(ranked, places, strict=True):
        point, low, high = (factor * x for x in rows[name])
        if low == low:
            axes.plot([low, high], [place, place], color=own[name].color, linewidth=2, alpha=0.5)
        axes.plot([point], [place], own[name].mark, color=own[name].color)
    axes.set_yticks(places, ranked)


def told_chance(levels: Iterable[float]) -> str:
    """What a title says of the accuracies of guesses, each in 0..1; nothing where none is known."""
    shown = list(dict.fromkeys(f"{100 * level:.3g} %" for level in levels))
    return f"; chance: {' or '.join(shown)}" if shown else ""


def chance_line(axes: Any, level: float | None, across: bool = False) -> None:
    """A thin dotted line at the accuracy of guesses, named in the legend.

    None where the level is not known, or lies beyond what the axes show: it must not squeeze them.

    Args:
        axes: with everything else drawn, in percent.
        level: in 0..1, or None.
        across: accuracies go from left to right.
    """
    if level is None:
        return
    low, high = axes.get_xlim() if across else axes.get_ylim()
    if low <= 100 * level <= high:
        draw = axes.axvline if across else axes.axhline
        draw(100 * level, color="#444444", linestyle=(0, (1, 3)), linewidth=1, label="chance")


def _or_least(value: float) -> float:
    return value if value == value else -math.inf


def cross(axes: Any, x: Interval, y: Interval, look: Look, label: str, factor: float) -> None:
    """A point, and a bar over its interval in each direction.

    Args:
        axes: to draw on.
        x, y: means with their ends.
        look: of the point, see `looks`.
        label: in the legend.
        factor: multiplies the values.
    """
    color = look.color
    (across, left, right), (up, low, high) = ([factor * v for v in i] for i in (x, y))
    if left == left:
        axes.plot([left, right], [up, up], color=color, linewidth=2, alpha=0.5)
    if low == low:
        axes.plot([across, across], [low, high], color=color, linewidth=2, alpha=0.5)
    axes.plot([across], [up], look.mark, color=color, label=label)


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


def as_written(figure: Figure) -> None:
    """Have a figure's texts drawn as they are: dollar signs of a label are no formula.

    The numbers along logarithmic axes are formulas, and stay so.
    """
    from matplotlib.text import Text

    axes = [axis for own in figure.axes for axis in (own.xaxis, own.yaxis)]
    logarithmic = [axis for axis in axes if axis.get_scale() != "linear"]
    formulas = {text for axis in logarithmic for text in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if text not in formulas:
            text.set_parse_math(False)


def save(figure: Any, path: Path) -> None:
    """Write the figure atomically, with one legend for all panels if curves have labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    finish(figure)
    as_written(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba().tobytes())
    buffer = io.BytesIO()
    # Few colors make a quarter of the size, for figures that are kept in a repository.
    image.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
    write_vectors(figure, path)


def write_vectors(figure: Any, path: Path) -> None:
    """Where `VECTORS` is set: the figure as PDF and SVG beside a PNG file."""
    for kind in ("pdf", "svg") if VECTORS.get() else ():
        with same_bytes(path.stem):
            write_atomic(path.with_suffix(f".{kind}"), vector(figure, kind))


@contextmanager
def same_bytes(name: str) -> Iterator[None]:
    """matplotlib's settings for a figure that is to come out the same each time."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "pdf.fonttype": 42,
                     "text.parse_math": False, "font.family": "DejaVu Sans"}):  # fmt: skip
        yield


def vector(figure: Any, kind: str) -> bytes:
    """The file of a figure, "pdf" or "svg", without the time and the program that made it."""
    nothing = {
        "svg": ("Date", "Creator", "Format", "Type"),
        "pdf": ("CreationDate", "Creator", "Producer"),
    }
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=dict.fromkeys(nothing[kind]))
    return buffer.getvalue()

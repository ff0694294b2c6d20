"""Figures of agents: the router over one episode, returns over training.

Shapes: L steps of an episode, M experts a layer can hold, E experts that an episode used, K points
of a learning curve.
"""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.statistics import Trace
from dynmoe.lab.figures import COLORS, as_written, looks, write_vectors
from dynmoe.lab.files import write_atomic
from dynmoe.moe.diagnostics import gate_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPERT_COLORS = tuple(COLORS[i] for i in (4, 2, 9, 7, 5, 3, 8, 6, 1, 0))
"""One per expert, the most distinct first; experts after these take them again, paler."""
FLOOR_COLORS = ("#e8f1d4", "#bfdfb0", "#8cc9a1", "#57ad9c", "#338e96", "#256f8c", "#24507e",
                "#27336b", "#221b4d")  # fmt: skip
"""One per floor, darker as it goes down; deeper floors take them again."""
THUMBNAIL = 4.2
"""Inches that a router figure is wide in TensorBoard, whose cards are about 400 pixels wide."""
MOST_COLUMNS = 500
"""Longer episodes are drawn as means of neighbouring steps: single ones would be a blur."""
BAND_POINTS = 200
"""Points at which the interval over seeds is worked out; between them it is drawn straight."""


def router_figure(
    trace: Trace,
    title: str,
    pictures: dict[int, NDArray[np.uint8]] | None = None,
    width: float = 10,
) -> Figure:
    """Who is in charge: gate shares of one episode, a row per MoE layer, floors beneath.

    Above them, what was seen at some steps: `pictures`, step -> [height, width, 3].

    Shares are stacked, expert 0 lowest, and step t fills [t, t + 1]. Experts that no step of the
    episode used are left out: those to come, and with sparse routers those never chosen. Episodes
    longer than 500 steps are drawn as the means of neighbouring steps.

    Args:
        trace: the episode.
        title: stands above, with its return and length.
        pictures: see above.
        width: inches; letters keep their size, so that a narrow one can be read as a thumbnail.

    Raises:
        ValueError: the network is dense; ask `trace.gates` first.
    """
    if not trace.gates:
        raise ValueError("a dense network has no router to draw")
    from matplotlib.figure import Figure

    rows, length = len(trace.gates), len(trace.floors)
    height = 1.3 + 1.9 * rows
    whole = Figure(figsize=(width, height + 2.4 * bool(pictures)), layout="constrained")
    ends = f"return {trace.episode_return:.1f}, {length} steps, deepest floor {trace.deepest}"
    whole.suptitle(f"{title}\n{ends}", fontsize=11 if width > THUMBNAIL else 8.5)
    figure: Any = whole
    if pictures:
        parts: Any = whole.subfigures(2, 1, height_ratios=[2.4, height])
        above, figure = parts
        _draw_pictures(above, pictures, trace.floors.tolist())
    grid = figure.subplots(
        rows + 1, 1, sharex=True, squeeze=False, height_ratios=[1.0] * rows + [0.12]
    )
    *panels, strip = grid.flat
    handles: dict[int, Any] = {}
    for axes, (name, gates) in zip(panels, trace.gates.items(), strict=True):
        handles |= _draw_shares(axes, gates)
        axes.set(xlim=(0, length), ylim=(0, 1), yticks=(0, 0.5, 1), ylabel=f"{name}\ngate share")
        axes.spines[["top", "right"]].set_visible(False)
    _draw_floors(panels, strip, trace.floors.tolist(), room=10 / width)
    experts = sorted(handles)
    figure.legend([handles[e] for e in experts], [f"expert {e}" for e in experts], frameon=False,
                  fontsize=9, reverse=True, loc="outside right center")  # fmt: skip
    for step in pictures or ():
        strip.plot(step + 0.5, 0, "^", color="#222222", markersize=5, clip_on=False)
    return whole


def shown_steps(floors: list[int]) -> list[int]:
    """Steps of an episode to be pictured: the last on a floor and the first on the next, or so.

    At most 6, in order: of three changes of floor the first; with fewer also the first and the
    last step; without any change four steps spread evenly.
    """
    last, changes = len(floors) - 1, floor_changes(floors)[:3]
    steps = {step for change in changes for step in (change - 1, change)}
    if len(changes) < 3:
        steps |= {0, last}
    if not changes:
        steps |= {last // 3, 2 * last // 3}
    return sorted(steps)


def _draw_pictures(figure: Any, pictures: dict[int, NDArray[np.uint8]], floors: list[int]) -> None:
    """A row of what was seen, with step and floor above."""
    row = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (step, picture) in zip(row, pictures.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(f"step {step}, floor {floors[step]}", fontsize=9)
        axes.set(xticks=(), yticks=())


def used_shares(gates: Tensor) -> dict[int, NDArray[np.float64]]:
    """Expert -> its gate share [L] at each step, of the experts that gates [L, M] use at all.

    The others are taken away before gates become shares, which a row of zeros would give them.
    """
    used = (gates > 0).any(dim=0).nonzero().flatten()
    shares = gate_shares(gates[:, used]).numpy()
    return dict(zip(used.tolist(), shares.T, strict=True))


def expert_color(expert: int) -> tuple[float, float, float]:
    """Colour of an expert, as red, green and blue in 0..1."""
    red, green, blue = bytes.fromhex(EXPERT_COLORS[expert % len(EXPERT_COLORS)][1:])
    white = 0.5 if expert >= len(EXPERT_COLORS) else 0.0
    return tuple(white + (1 - white) * x / 255 for x in (red, green, blue))  # type: ignore[return-value]


def averaged(rows: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Rows [L, E] as [columns, E]: means of neighbours if those are fewer, else repeated rows."""
    edges = np.arange(columns + 1) * len(rows) // columns
    starts, ends = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
    sums = np.concatenate([np.zeros_like(rows[:1]), rows.cumsum(axis=0)])
    return (sums[ends] - sums[starts]) / (ends - starts)[:, None]


def floor_changes(floors: list[int]) -> list[int]:
    """Steps t at which the floor is another than at t - 1."""
    return [t for t in range(1, len(floors)) if floors[t] != floors[t - 1]]


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    as_written(figure)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, buffer.getvalue())
    write_vectors(figure, path)


def learning_figure(
    path: Path, curves: dict[str, dict[str, Any]], title: str, max_return: float | None = None
) -> None:
    """Write `draw_learning` as a PNG file, atomically."""
    write_figure(path, draw_learning(curves, title, max_return))


def draw_learning(
    curves: dict[str, dict[str, Any]], title: str, max_return: float | None = None
) -> Figure:
    """The mean episodic return over environment steps, one curve per variant.

    With several seeds: their mean, and a band of its 95 % t interval. Each seed's curve is
    joined across points where no episode ended, and held after its last; the mean begins where all
    seeds have begun. A seed in which no episode ended is left out, and the legend counts the rest.

    Args:
        curves: variant -> {"steps": [K] environment steps, "returns": [seeds][K], nan where no
            episode ended}; optional "growths": steps at which it grew, marked by triangles.
        title: environment and network: what the returns are about.
        max_return: the most an episode can return, for a second axis in percent of it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = figure.subplots()
    own = looks(curves)
    for name, curve in curves.items():
        _draw_curve(axes, name, curve, own[name].color, own[name].line)
    growing = [name for name, curve in curves.items() if curve.get("growths")]
    for row, name in enumerate(growing):
        growths = curves[name]["growths"]
        axes.plot(growths, [0.025 + 0.04 * row] * len(growths), "^", markersize=7,
                  color=own[name].color, markeredgecolor="white", clip_on=False,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    if growing:
        axes.plot([], [], "^", color="#8a8a8a", markersize=7, label="growth")
    axes.set(xlabel="environment steps", ylabel="mean episodic return")
    axes.set_title(title, fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if max_return:
        _add_percent(axes, max_return)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9,
                  loc="outside right upper")  # fmt: skip
    return figure


def _draw_curve(axes: Axes, name: str, curve: dict[str, Any], color: str, line: str) -> None:
    """One variant: the mean over its seeds, and their band."""
    steps, seeds = _joined(curve["steps"], curve["returns"])
    count = f" ({len(seeds)} seeds)" if len(curve["returns"]) > 1 else ""
    if not len(seeds):
        axes.plot([], [], line, color=color, label=f"{name} (no episode ended)")
        return
    dot = "o" if len(steps) == 1 else None
    axes.plot(steps, seeds.mean(axis=0), line, color=color, label=name + count, linewidth=1.8,
              marker=dot)  # fmt: skip
    if len(seeds) > 1:
        axes.fill_between(*_band(steps, seeds), color=color, alpha=0.15, linewidth=0)


def _add_percent(axes: Axes, most: float) -> None:
    """A second axis on the right: the same returns in percent of the most possible."""

    def percent(returns: Any) -> Any:
        return 100 * returns / most

    def back(percent: Any) -> Any:
        return percent * most / 100

    second = axes.secondary_yaxis("right", functions=(percent, back))
    second.set_ylabel(f"% of the most possible ({most:g})")
    second.spines["right"].set_visible(False)


def _joined(
    steps: list[int], returns: list[list[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps [J] from where all seeds have begun, and the seeds' returns there [seeds, J]."""
    x, rows, begin = np.asarray(steps, dtype=np.float64), [], 0
    for seed in returns:
        y = np.asarray(seed, dtype=np.float64)
        known = np.flatnonzero(np.isfinite(y))
        if len(known):
            rows.append(np.interp(x, x[known], y[known]))
            begin = max(begin, int(known[0]))
    seeds = np.stack(rows) if rows else np.zeros((0, len(x)))
    return x[begin:], seeds[:, begin:]


def _band(steps: NDArray[np.float64], seeds: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """Steps, lower and upper end of the 95 % interval of the mean over seeds [seeds, J]."""
    from dynmoe.lab.statistics import confidence_interval

    some = np.unique(np.linspace(0, len(steps) - 1, BAND_POINTS).round().astype(int))
    intervals = [confidence_interval(seeds[:, j], "mean") for j in some]
    return steps[some], [i.low for i in intervals], [i.high for i in intervals]


def _draw_shares(axes: Axes, gates: Tensor) -> dict[int, Any]:
    """Stack the shares of gates [L, M]; returns the area of each expert."""
    shares, length = used_shares(gates), len(gates)
    columns = min(length, MOST_COLUMNS)
    rows = averaged(np.stack(list(shares.values()), axis=1), columns)
    edges = np.arange(columns + 1) * length // columns
    areas = axes.stackplot(edges, np.append(rows, rows[-1:], axis=0).T, step="post", linewidth=0,
                           colors=[expert_color(e) for e in shares])  # fmt: skip
    return dict(zip(shares, areas, strict=True))


def _draw_floors(panels: list[Axes], strip: Axes, floors: list[int], room: float) -> None:
    """A strip coloured by floor, and a labelled line across all panels where the floor changes.

    `room`: that labels need, 1 in a figure of 10 inches.
    """
    changes, length = floor_changes(floors), len(floors)
    for start, end in zip([0, *changes], [*changes, length], strict=True):
        shade = floors[start] % len(FLOOR_COLORS)
        strip.axvspan(start, end, color=FLOOR_COLORS[shade], linewidth=0)
        if end - start >= 0.03 * room * length:  # there is room
            strip.text((start + end) / 2, 0.45, str(floors[start]), fontsize=8, ha="center",
                       va="center", color="black" if shade < 4 else "white")  # fmt: skip
    strip.set(yticks=(), ylim=(0, 1), xlabel="step", xlim=(0, length))
    strip.set_ylabel("floor", rotation=0, ha="right", va="center")
    strip.spines[:].set_visible(False)
    gaps = [b - a for a, b in pairwise([*changes, length])]
    upright = bool(gaps) and min(gaps) < 0.08 * room * length
    labelled = -math.inf
    for t in changes:
        for axes in panels:
            axes.axvline(t, color="white", linewidth=2.4)
            axes.axvline(t, color="#222222", linewidth=1, linestyle=(0, (4, 2)))
        if t - labelled >= 0.02 * room * length:  # closer ones would lie over each other
            panels[0].annotate(f"floor {floors[t]}", (t, 1), (0, 5), fontsize=9, ha="center",
                               va="bottom", rotation=90 if upright else 0, annotation_clip=False,
                               xycoords="data", textcoords="offset points")  # fmt: skip
            labelled = t

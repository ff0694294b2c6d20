"""The figures of a page about finished runs, as SVG and PDF, the same bytes each time.

Names of variants come from files and may hold anything: nothing in them is read as mathematics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from dynmoe.lab.comparison import Row
from dynmoe.lab.experiment import Curve, Experiment
from dynmoe.lab.figures import band, dots, finish, looks, new_figure, same_bytes, vector
from dynmoe.lab.finished import FinishedRun, Group
from dynmoe.lab.statistics import confidence_interval

MOST_CURVES = 12
"""Variants that a figure shows as curves or matrices."""
MOST_POINTS = 100
"""Points of a curve; of more, evenly spaced ones are drawn."""
MOST_LETTERS = 48
"""of a name in a figure"""
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Drawing:
    """A figure."""

    name: str
    """of its files"""
    caption: str
    """what it shows"""
    svg: bytes
    """a file of its own"""
    pdf: bytes
    """the same"""

    def inline(self) -> str:
        """The SVG element for a page: it names no other place, and its ids are the figure's own."""
        for prefix, place in (("", SVG), ("xlink", XLINK)):
            ElementTree.register_namespace(prefix, place)
        root = ElementTree.fromstring(self.svg)
        for element in root.iter():
            for key, value in element.attrib.items():
                if key == "id":
                    element.set(key, f"{self.name}-{value}")
                elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                    element.set(key, f"#{self.name}-{value[1:]}")
                elif "url(#" in value:
                    element.set(key, re.sub(r"url\(#", f"url(#{self.name}-", value))
        root.set("role", "img")
        root.set("width", "100%")
        del root.attrib["height"]
        return ElementTree.tostring(root, encoding="unicode")


def draw_all(group: Group, stream: str, rows: list[Row], name: str) -> list[Drawing]:
    """Means with intervals, curves, and matrices, of one stream; those that there are.

    Args:
        group: its runs.
        stream: which.
        rows: its variants compared.
        name: begins the names of the figures.
    """
    about = group.experiment.describe(group.experiment.metric, group.experiment.at)
    shown = most_telling(rows)
    few = f"{len(shown)} of {len(rows)} variants: the first, and the highest"
    few = few if len(shown) < len(rows) else ""
    runs = [run for v in shown for run in group.runs[stream][v].values()]
    titles = dict.fromkeys(title for run in runs for title in run.details.matrices)
    captions = {
        "means": _sentences(f"{about}: mean over seeds, with 95 % t intervals"),
        "curves": _sentences("mean over seeds, with 95 % t intervals", few),
        "matrices": _sentences(*titles, "mean over seeds", few),
    }
    makers: dict[str, Callable[[], Any]] = {
        "means": lambda: _draw_means(group.experiment, rows),
        "curves": lambda: _draw_curves(group, stream, shown),
        "matrices": lambda: _draw_matrices(group, stream, shown),
    }
    drawings = []
    for kind, make in makers.items():
        with same_bytes(f"{name}-{kind}"):
            figure = make()
            if figure is not None:
                svg = vector(figure, "svg")
                figure.set_layout_engine("none")  # laid out by now, and that takes its time
                pdf = vector(figure, "pdf")
                drawings.append(Drawing(f"{name}-{kind}", captions[kind], svg, pdf))
    return drawings


def most_telling(rows: list[Row]) -> list[str]:
    """The variants that are shown where there is no room for all, in order."""
    ranked = sorted(rows[1:], key=lambda row: _or_least(row.mean.point), reverse=True)
    chosen = {rows[0].variant, *(row.variant for row in ranked[: MOST_CURVES - 1])}
    return [row.variant for row in rows if row.variant in chosen]


def _draw_means(experiment: Experiment, rows: list[Row]) -> Any:
    """A row for each variant with a mean, or None."""
    known = {row.variant: row.mean for row in rows if not math.isnan(row.mean.point)}
    if not known:
        return None
    factor, unit, _ = experiment.unit(experiment.metric)
    figure = new_figure("", 1 + 0.24 * len(known), 8)
    axes = figure.subplots()
    dots(axes, {_shortened(variant): mean for variant, mean in _distinct(known).items()}, factor)
    label = experiment.describe(experiment.metric, experiment.at)
    axes.set(xlabel=f"{label} (%)" if unit else label)
    finish(figure)
    return figure


def _draw_curves(group: Group, stream: str, shown: list[str]) -> Any:
    """A panel for each of the curves that the runs have, or None."""
    runs = {variant: list(group.runs[stream][variant].values()) for variant in shown}
    names = dict.fromkeys(n for own in runs.values() for run in own for n in run.details.curves)
    if not names:
        return None
    own_looks = looks(group.variants)
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = new_figure("", 3.2 * lines, 11 if columns > 1 else 8)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for name, axes in zip(names, grid.flat, strict=False):
        factor, unit, _ = group.experiment.unit(name)
        label, clock = name.replace("_", " "), ""
        for variant, own in runs.items():
            curves = [run.details.curves[name] for run in own if name in run.details.curves]
            if len(curves) < len(own):
                continue
            places, values = aligned(curves)
            intervals = [confidence_interval(list(seeds), "mean") for seeds in values]
            look, clock = own_looks[variant], curves[0].clock
            # matplotlib leaves out of legends what begins with an underscore.
            named = _shortened(variant if not variant.startswith("_") else f" {variant}")
            band(axes, places, intervals, look, named, factor)
        axes.set(xlabel=clock, ylabel=f"{label} (%)" if unit else label)
    finish(figure)
    return figure


def aligned(curves: list[Curve]) -> tuple[list[float], list[list[float]]]:
    """Places that all curves have, and the values there: [points], [points][seeds]."""
    by_place = [dict(curve.points) for curve in curves]
    places = [p for p, _ in curves[0].points if all(p in own for own in by_place)]
    if len(places) > MOST_POINTS:
        chosen = np.linspace(0, len(places) - 1, MOST_POINTS).round().astype(int)
        places = [places[i] for i in chosen]
    return places, [[own[place] for own in by_place] for place in places]


def _draw_matrices(group: Group, stream: str, shown: list[str]) -> Any:
    """A picture for each variant whose runs have matrices, or None."""
    tables = []
    for variant in shown:
        tables += _mean_matrices(variant, list(group.runs[stream][variant].values()))
    if not tables:
        return None
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure = new_figure("", 3.4 * lines, 11)
    grid = figure.subplots(lines, columns, squeeze=False)
    picture = None
    for (title, table), axes in zip(tables, grid.flat, strict=False):
        picture = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set_title(_shortened(title), fontsize=9)
    for axes in grid.flat[len(tables) :]:
        axes.remove()
    figure.colorbar(picture, ax=grid[0, 0] if len(tables) == 1 else list(figure.axes), shrink=0.7)
    return figure


def _mean_matrices(variant: str, runs: list[FinishedRun]) -> list[tuple[str, NDArray[np.float64]]]:
    """Title and mean over seeds of the matrices that all runs have, of one shape."""
    found = []
    for title in runs[0].details.matrices:
        own = [np.array(run.details.matrices.get(title, [[]]), dtype=float) for run in runs]
        if len({table.shape for table in own}) == 1:
            found.append((variant, np.mean(own, axis=0)))
    return found


def _sentences(*texts: str) -> str:
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in texts if text)


def _distinct(known: dict[str, Any]) -> dict[str, Any]:
    """The same with numbers before names that would be cut to the same text."""
    cut = [_shortened(name) for name in known]
    return {
        f"{place}: {name}" if cut.count(_shortened(name)) > 1 else name: value
        for place, (name, value) in enumerate(known.items(), start=1)
    }


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value

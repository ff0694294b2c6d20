"""Figures of a comparison, as PNG files. matplotlib and scikit-learn are imported only here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.lab.cache import Arrays
from dynmoe.lab.figures import COLORS
from dynmoe.lab.files import write_atomic

TSNE_SEED = 0
MARKERS = "os^DvP*Xph"


def parameters_figure(path: Path, found: dict[str, dict[str, Any]], title: str) -> None:
    """Average accuracy against the trainable parameters, with standard errors.

    The shape of Figure 1 of MoE². `found` is what `report.collect` gives.
    """
    figure, axes = _new(title, (6.4, 4.2))
    for number, (name, row) in enumerate(found.items()):
        mean, error = (100 * x for x in row["average"])
        color = COLORS[number % len(COLORS)]
        axes.errorbar(row["trainable"], mean, None if error != error else error, fmt="o",
                      color=color, capsize=3)  # fmt: skip
        axes.annotate(name, (row["trainable"], mean), xytext=(5, 5), textcoords="offset points",
                      fontsize=8, color=color)  # fmt: skip
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="average test accuracy (%)")
    axes.margins(x=0.2)
    _save(figure, path)


def method_figures(
    folder: Path, name: str, arrays: Arrays, domains: list[str], left_out: str
) -> None:
    """Draw what a run kept of its first left-out domain: features, routing, the loss plane."""
    where = f"{name}, {left_out} left out"
    if "features" in arrays and len(arrays["features"]) > 5:
        features_figure(folder / f"features_{name}.png", arrays, domains, where)
    if "gates" in arrays:
        routing_figure(folder / f"routing_{name}.png", arrays["gates"], domains, where)
    if "plane_axis" in arrays:
        plane_figure(folder / f"landscape_{name}.png", arrays, where)


def features_figure(path: Path, arrays: Arrays, domains: list[str], title: str) -> None:
    """t-SNE of the features that enter the head: colour for the class, marker for the domain.

    van der Maaten and Hinton 2008, by scikit-learn; distances between clusters say little.
    """
    from sklearn.manifold import TSNE

    features = arrays["features"]
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=TSNE_SEED).fit_transform(features)
    figure, axes = _new(f"t-SNE of features: {title}", (6.4, 5.2))
    for number, domain in enumerate(domains):
        own = arrays["domain"] == number
        colors = [COLORS[label % len(COLORS)] for label in arrays["label"][own]]
        axes.scatter(points[own, 0], points[own, 1], s=16, c=colors,
                     marker=MARKERS[number % len(MARKERS)], label=domain)  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def routing_figure(path: Path, gates: Any, domains: list[str], title: str) -> None:
    """Mean gate of each expert in each domain, [domains, E], as bars side by side."""
    figure, axes = _new(f"routing by domain: {title}", (6.4, 3.6))
    width = 0.8 / len(domains)
    for number, domain in enumerate(domains):
        x = np.arange(gates.shape[1]) + width * (number - (len(domains) - 1) / 2)
        axes.bar(x, gates[number], width, color=COLORS[number % len(COLORS)], label=domain)
    top = 1.2 * float(gates.max())  # room for the legend
    axes.set(xlabel="expert", ylabel="mean gate", xticks=range(gates.shape[1]), ylim=(0, top))
    axes.legend(frameon=False, fontsize=8, ncols=len(domains), loc="upper center")
    _save(figure, path)


def plane_figure(path: Path, arrays: Arrays, title: str) -> None:
    """Contours of the loss on the plane of `measure.landscape_array`: sources, and the test."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4), layout="constrained")
    figure.suptitle(f"loss around the last weights: {title}", fontsize=10)
    for axes, part in zip(figure.subplots(1, 2), ("source", "test"), strict=True):
        axis, values = arrays["plane_axis"], arrays[f"plane_{part}"]
        drawn = axes.contourf(axis, axis, values, levels=16, cmap="viridis")
        axes.plot(0, 0, "x", color="white")
        axes.set_title({"source": "source domains", "test": "left-out domain"}[part], fontsize=9)
        figure.colorbar(drawn, ax=axes, label="nats")
    _save(figure, path)


def _new(title: str, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={})
    write_atomic(path, buffer.getvalue())

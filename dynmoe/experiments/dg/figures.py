"""What a run kept of its first left-out domain, drawn as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.lab.cache import Arrays
from dynmoe.lab.figures import COLORS, new_figure, save

TSNE_SEED = 0
MARKERS = "os^DvP*Xph"


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
    figure = new_figure(f"t-SNE of features: {title}", 5.2, 6.4)
    axes = figure.subplots()
    for number, domain in enumerate(domains):
        own = arrays["domain"] == number
        colors = [COLORS[label % len(COLORS)] for label in arrays["label"][own]]
        axes.scatter(points[own, 0], points[own, 1], s=16, c=colors,
                     marker=MARKERS[number % len(MARKERS)], label=domain)  # fmt: skip
    axes.set(xticks=[], yticks=[])
    save(figure, path)


def routing_figure(path: Path, gates: Any, domains: list[str], title: str) -> None:
    """Mean gate of each expert in each domain, [domains, E], as bars side by side."""
    figure = new_figure(f"routing by domain: {title}", 3.6, 6.4)
    axes = figure.subplots()
    width = 0.8 / len(domains)
    for number, domain in enumerate(domains):
        x = np.arange(gates.shape[1]) + width * (number - (len(domains) - 1) / 2)
        axes.bar(x, gates[number], width, color=COLORS[number % len(COLORS)], label=domain)
    axes.set(xlabel="expert", ylabel="mean gate", xticks=range(gates.shape[1]))
    save(figure, path)


def plane_figure(path: Path, arrays: Arrays, title: str) -> None:
    """Contours of the loss on the plane of `measure.landscape_array`: sources, and the test."""
    figure = new_figure(f"loss around the last weights: {title}", 4, 8.6)
    for axes, part in zip(figure.subplots(1, 2), ("source", "test"), strict=True):
        axis, values = arrays["plane_axis"], arrays[f"plane_{part}"]
        drawn = axes.contourf(axis, axis, values, levels=16, cmap="viridis")
        axes.plot(0, 0, "x", color="white")
        axes.set_title({"source": "source domains", "test": "left-out domain"}[part], fontsize=9)
        figure.colorbar(drawn, ax=axes, label="nats")
    save(figure, path)

"""The loss around the last weights of a run, on a plane: Figure 4 of MoE² and its kin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe import seeding
from dynmoe.dg.method import DGMethod
from dynmoe.experiments.dg.source import Source
from dynmoe.lab.cache import Arrays
from dynmoe.lab.figures import new_figure, save

PLANE = 1.0
"""The plane of random directions reaches this far, in lengths of the weights."""
MARGIN = 1.2
"""The plane of principal directions reaches this far, as a multiple of the path's."""


@torch.no_grad()
def weights_now(method: DGMethod) -> Tensor:
    """[P] all trainable weights in one row, on the CPU."""
    return torch.cat([w.detach().flatten().cpu() for w in method.trainable()])


def principal_directions(path: Tensor) -> tuple[Tensor, Tensor]:
    """Two orthonormal directions [2, P] in which weights moved most, and the path [N, 2] in them.

    The first two principal components of the differences to the last weights: Li et al. 2018 (arXiv
    1712.09913), Section 7.2. Where the path is a line the second is an arbitrary one beside it.

    Args:
        path: [N, P] weights at N times, the last ones last.
    """
    moved = (path - path[-1]).double()
    _, _, rows = torch.linalg.svd(moved, full_matrices=False)
    directions = rows[:2]
    return directions.to(path.dtype), (moved @ directions.T).to(path.dtype)


def random_directions(start: list[Tensor], generator: torch.Generator) -> list[list[Tensor]]:
    """Two random directions, each tensor scaled to the length of the weights that it moves.

    A direction has a tensor for each of `start`, of its shape.

    Li et al. 2018, Section 4, with whole tensors for filters (our choice).
    """
    directions = []
    for _ in range(2):
        drawn = [torch.randn(w.shape, generator=generator).to(w.device) for w in start]
        directions.append([
            d * (w.norm() / d.norm().clamp(min=1e-12)) for d, w in zip(drawn, start, strict=True)
        ])  # fmt: skip
    return directions


@torch.no_grad()
def landscape_arrays(fold: Any, side: int) -> Arrays:
    """Loss on two planes through the last weights, for source images and the left-out domain.

    The mean loss in nats over 64 images of "out" of all sources, and of the test.

    Returns:
        `plane_source` and `plane_test` [side, side], `plane_axis` [side], of random directions;
        `principal_source`, `principal_test` and `principal_axis`, of principal ones, and
        `principal_path` [N, 2], where the weights were at each evaluation.
    """
    weights = fold.method.trainable()
    start = [w.detach().clone() for w in weights]
    generator = seeding.generator(fold.config.seed, "landscape", fold.test)
    axis = torch.linspace(-PLANE, PLANE, side)
    found = _on_plane(fold, start, random_directions(start, generator), axis, "plane")
    flat, path = principal_directions(torch.stack([*fold.path, weights_now(fold.method)]))
    sizes = [w.numel() for w in weights]
    directions = [
        [part.view_as(w).to(w) for part, w in zip(row.split(sizes), weights, strict=True)]
        for row in flat
    ]
    reach = MARGIN * float(path.abs().max()) or PLANE  # weights that never moved
    axis = torch.linspace(-reach, reach, side)
    found |= _on_plane(fold, start, directions, axis, "principal")
    return {**found, "principal_path": path.numpy()}


def _on_plane(
    fold: Any, start: list[Tensor], directions: list[list[Tensor]], axis: Tensor, name: str
) -> Arrays:
    """The arrays of one plane, beginning with `name`; the weights are left at the start."""
    method, source, side = fold.method, fold.trial.source, len(axis)
    weights = method.trainable()
    batches = {
        f"{name}_source": [(n, fold.trial.splits[n][1]) for n in fold.sources],
        f"{name}_test": [(fold.test, fold.trial.splits[fold.test][1])],
    }
    found: Arrays = {f"{name}_axis": axis.numpy()}
    found |= {part: np.zeros((side, side)) for part in batches}
    method.eval()
    try:
        for i, a in enumerate(axis.tolist()):
            for j, b in enumerate(axis.tolist()):
                for w, base, u, v in zip(weights, start, *directions, strict=True):
                    w.copy_(base + a * u + b * v)
                for part, parts in batches.items():
                    losses = [_loss(fold, method, source, n, c[:64]) for n, c in parts]
                    found[part][i, j] = sum(losses) / len(losses)
    finally:
        for w, base in zip(weights, start, strict=True):
            w.copy_(base)
    return found


def _loss(fold: Any, method: DGMethod, source: Source, number: int, chosen: Tensor) -> float:
    device = fold.trial.run.device
    domain, known = source.data.domains[number], fold.trial.embedding(method, number)
    known = None if known is None else known[chosen.to(device)]
    logits = method(source.prepare.batch(domain, chosen).to(device), known)
    return float(F.cross_entropy(logits, domain.labels[chosen].to(device)))


def plane_figures(folder: Path, name: str, arrays: Arrays, title: str) -> None:
    """Contours of the loss on both planes of `landscape_arrays`: sources, and the test.

    On the principal one also the way of the weights, from evaluation to evaluation.
    """
    for plane, file in (("plane", "landscape"), ("principal", "landscape_principal")):
        if f"{plane}_axis" not in arrays:
            continue
        axis, way = arrays[f"{plane}_axis"], arrays.get(f"{plane}_path")
        figure = new_figure(f"loss around the last weights: {title}", 4, 8.6)
        for axes, part in zip(figure.subplots(1, 2), ("source", "test"), strict=True):
            values = arrays[f"{plane}_{part}"]
            drawn = axes.contourf(axis, axis, values.T, levels=16, cmap="viridis")
            if way is not None:
                axes.plot(way[:, 0], way[:, 1], ".-", color="white", linewidth=1)
                axes.set(xlabel="first principal direction", ylabel="second")
            axes.plot(0, 0, "x", color="white")
            shown = {"source": "source domains", "test": "left-out domain"}[part]
            axes.set_title(shown, fontsize=9)
            figure.colorbar(drawn, ax=axes, label="nats")
        save(figure, folder / f"{file}_{name}.png")

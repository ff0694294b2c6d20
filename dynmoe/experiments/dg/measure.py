"""What is measured and drawn of a method: accuracy, features and routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.dg.method import DGMethod
from dynmoe.experiments.dg.landscape import plane_figures
from dynmoe.experiments.dg.source import Source
from dynmoe.lab import processes
from dynmoe.lab.cache import Arrays
from dynmoe.lab.figures import COLORS, new_figure, save
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.model import moe_layers
from dynmoe.plasticity.calibration import confidences

Batches = Iterator[tuple[Tensor, Tensor | None, Tensor]]
"""Images [B, 3, H, W] or what stands for them, their embeddings [B, E] or None, labels int64 [B]"""
Embeddings = Callable[[DGMethod, int], Tensor | None]
"""(method, number of a domain) -> frozen embeddings [N, D] of its images, or None"""
TSNE_SEED = 0
MARKERS = "os^DvP*Xph"


@torch.no_grad()
def confidence(method: DGMethod, batches: Batches) -> tuple[Tensor, Tensor]:
    """Confidence [N] float64 in images, and where it is right, [N] bool; in evaluation mode.

    See `dynmoe.plasticity.calibration.confidences`. Processes that share a run have every P-th of
    the batches each, and are told of all.
    """
    method.eval()
    judged = [confidences(method(images, known), labels) for images, known, labels in batches]
    judged = processes.all_items(judged)
    sure, right = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return sure, right


@torch.no_grad()
def mean_loss(method: DGMethod, batches: Batches) -> float:
    """Mean cross-entropy, nats, on images, in evaluation mode; processes as in `confidence`."""
    method.eval()
    found: list[tuple[float, int]] = []
    for images, known, labels in batches:
        logits = method(images, known)
        loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        found.append((float(loss), len(labels)))
    losses, counts = zip(*processes.all_items(found), strict=True)
    return sum(losses) / sum(counts)


@torch.no_grad()
def feature_arrays(
    method: DGMethod, source: Source, embedding: Embeddings, count: int, device: torch.device
) -> Arrays:
    """What enters the head, and the outer gates, for some images of each domain.

    Returns:
        `features` [M, D], `domain` [M], `label` [M], and `gates` [domains, E] (mean gate of each
        outer expert by domain) where the method has outer experts; `features` is left out where
        nothing passes through `method.head`.
    """
    seen: list[Tensor] = []
    gates: list[Tensor] = []
    outer = _outer(method)
    hooks = [method.head.register_forward_hook(lambda m, args, out: seen.append(args[0]))]
    domains, labels, shares = [], [], []
    method.eval()
    try:
        for number, domain in enumerate(source.data.domains):
            chosen = torch.linspace(0, len(domain) - 1, min(count, len(domain))).long()
            images = source.prepare.batch(domain, chosen).to(device)
            known = embedding(method, number)
            known = None if known is None else known[chosen.to(device)]
            method(images, known)
            if outer is not None and outer.last_routing is not None:
                gates = [outer.last_routing.gates.mean(0)]
                shares.append(torch.cat(gates).cpu())
            domains.append(torch.full((len(chosen),), number))
            labels.append(domain.labels[chosen])
    finally:
        for hook in hooks:
            hook.remove()
    found = {"domain": torch.cat(domains).numpy(), "label": torch.cat(labels).numpy()}
    if len(seen) == len(source.data.domains):
        found["features"] = torch.cat(seen).float().cpu().numpy()
    if shares:
        found["gates"] = torch.stack(shares).numpy()
    return found


def _outer(method: DGMethod) -> MoELayer | None:
    """The layer of outer experts, where the method has one."""
    return next((layer for _, layer in moe_layers(method)), None)


def method_figures(
    folder: Path, name: str, arrays: Arrays, domains: list[str], left_out: str
) -> None:
    """Draw what a run kept of its first left-out domain: features, routing, loss planes."""
    where = f"{name}, {left_out} left out"
    if "features" in arrays and len(arrays["features"]) > 5:
        features_figure(folder / f"features_{name}.png", arrays, domains, where)
    if "gates" in arrays:
        routing_figure(folder / f"routing_{name}.png", arrays["gates"], domains, where)
    plane_figures(folder, name, arrays, where)


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


def beside_figure(
    path: Path, methods: dict[str, Arrays], domains: list[str], left_out: str
) -> None:
    """t-SNE of the left-out domain's features, a panel for each method: Figure 3 of MoE².

    Colour for the class. Over each panel the mean silhouette of the classes in the features
    themselves (Rousseeuw 1987; 1: apart, 0: mixed), as t-SNE's distances say little.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    figure = new_figure(f"t-SNE of {left_out}, left out", 4.2, 4.0 * len(methods))
    for axes, (name, arrays) in zip(
        figure.subplots(1, len(methods), squeeze=False)[0], methods.items(), strict=True
    ):
        own = arrays["domain"] == domains.index(left_out)
        features, labels = arrays["features"][own], arrays["label"][own]
        few = 1 < len(set(labels.tolist())) < len(labels)
        apart = f", silhouette {silhouette_score(features, labels):.2f}" if few else ""
        tsne = TSNE(
            perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=TSNE_SEED
        )
        points = tsne.fit_transform(features)
        colors = [COLORS[label % len(COLORS)] for label in labels]
        axes.scatter(points[:, 0], points[:, 1], s=16, c=colors)
        axes.set(xticks=[], yticks=[], title=f"{name}{apart}")
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

"""What is measured of a method: accuracy, features and routing by domain, the loss plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynmoe import seeding
from dynmoe.dg.method import DGMethod
from dynmoe.experiments.dg.source import Source
from dynmoe.lab.cache import Arrays
from dynmoe.moe import MoELayer, moe_layers

Embeddings = Callable[[DGMethod, int], Tensor | None]
"""(method, number of a domain) -> frozen embeddings [N, D] of its images, or None"""
PLANE = 1.0
"""The loss plane reaches this far in each direction, in lengths of the weights."""


@torch.no_grad()
def accuracies(
    method: DGMethod,
    source: Source,
    number: int,
    indices: Tensor,
    embedding: Tensor | None,
    batch: int,
    device: torch.device,
) -> float:
    """Share of the images `indices` of a domain whose class is found, in evaluation mode."""
    domain, right = source.data.domains[number], 0
    method.eval()
    for chosen in indices.split(batch):
        known = None if embedding is None else embedding[chosen.to(device)]
        logits = method(source.prepare.batch(domain, chosen).to(device), known)
        right += int((logits.argmax(1).cpu() == domain.labels[chosen]).sum())
    return right / len(indices)


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


@torch.no_grad()
def landscape_array(fold: Any, side: int) -> Arrays:
    """Loss on a plane through the last weights, for source images and for the left-out domain.

    The plane is spanned by two random directions, each tensor of a direction scaled to the length
    of the weights it moves: Li et al. 2018 (arXiv 1712.09913), Section 4, with whole tensors for
    filters (our choice). Mean loss in nats over 64 images of "out" of all sources, and of the test.

    Returns:
        `plane_source` and `plane_test` [side, side], `plane_axis` [side].
    """
    method, source = fold.method, fold.trial.source
    weights = method.trainable()
    start = [w.detach().clone() for w in weights]
    generator = seeding.generator(fold.config.seed, "landscape", fold.test)
    directions = []
    for _ in range(2):
        drawn = [torch.randn(w.shape, generator=generator).to(w.device) for w in weights]
        directions.append([
            d * (w.norm() / d.norm().clamp(min=1e-12)) for d, w in zip(drawn, start, strict=True)
        ])  # fmt: skip
    batches = {
        "plane_source": [(n, fold.trial.splits[n][1]) for n in fold.sources],
        "plane_test": [(fold.test, fold.trial.splits[fold.test][1])],
    }
    axis = torch.linspace(-PLANE, PLANE, side)
    found: Arrays = {"plane_axis": axis.numpy()}
    found |= {name: np.zeros((side, side)) for name in batches}
    method.eval()
    try:
        for i, a in enumerate(axis.tolist()):
            for j, b in enumerate(axis.tolist()):
                for w, base, u, v in zip(weights, start, *directions, strict=True):
                    w.copy_(base + a * u + b * v)
                for name, parts in batches.items():
                    losses = [_loss(fold, method, source, n, c[:64]) for n, c in parts]
                    found[name][i, j] = sum(losses) / len(losses)
    finally:
        for w, base in zip(weights, start, strict=True):
            w.copy_(base)
    return found


def _loss(fold: Any, method: DGMethod, source: Source, number: int, chosen: Tensor) -> float:
    device = fold.trial.run.device
    domain, known = source.data.domains[number], fold.trial.embedding(method, number)
    known = None if known is None else known[chosen.to(device)]
    logits = method(source.prepare.batch(domain, chosen).to(device), known)
    return float(torch.nn.functional.cross_entropy(logits, domain.labels[chosen].to(device)))


def _outer(method: DGMethod) -> MoELayer | None:
    """The layer of outer experts, where the method has one."""
    return next((layer for _, layer in moe_layers(method)), None)

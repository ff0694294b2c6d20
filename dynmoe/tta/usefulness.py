"""Is a learned routing worth anything? The same experts under other choices among them.

Shapes: B images in a batch, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe import MoELayer, Routing
from dynmoe.moe.model import undisturbed
from dynmoe.moe.router import hard_routing
from dynmoe.tta.diagnostics import moe_norms
from dynmoe.tta.entropy import wide

Choice = Callable[[MoELayer, Routing], Tensor]
"""A layer and its own routing -> the expert of each image instead, int64 [B]."""
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives batches again: images [B, C, H, W] and labels [B], both on the model's device."""


@contextmanager
def routed_by(model: nn.Module, choose: Choice) -> Iterator[None]:
    """Let `choose` pick the expert of each image in every MoELayerNorm, within the block."""

    def watch(layer: MoELayer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], own: Routing) -> Routing:
            expert = choose(layer, own)
            everywhere = torch.ones_like(expert, dtype=torch.bool)
            return hard_routing(expert, everywhere, own.active, own.gates)

        return layer.router.register_forward_hook(hook)

    handles = [watch(norm.layer) for _, norm in moe_norms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def usefulness(
    model: nn.Module, batches: Batches, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Loss and accuracy of a model with its own routing and with others; empty without experts.

    The definition is ours. Weights stay as they are, and the model is left as it was.

    Args:
        model: with MoELayerNorms.
        batches: called twice.
        generator: on the CPU, draws the experts of `random`.

    Returns:
        Per routing `loss`, the mean cross-entropy in nats, and `accuracy`, a share:
        learned: the model's own.
        random: in every layer each image gets an expert drawn uniformly, independently.
        most_loaded: in every layer all images get the one that most of them get when learned.
        best: all images get one number e in every layer, that of least loss, chosen in hindsight
            by the labels; `expert` is e. Numbers of different layers have nothing to do with each
            other, so these are E of the many ways to use one expert per layer.
    """
    layers = [norm.layer for _, norm in moe_norms(model)]
    if not layers:
        return {}
    loads = {layer: torch.zeros(layer.max_experts, dtype=torch.int64) for layer in layers}

    def own(layer: MoELayer, routing: Routing) -> Tensor:
        picks = routing.picks()
        loads[layer] += picks.sum(dim=0).long().cpu()
        return picks.argmax(dim=1)

    def random(layer: MoELayer, routing: Routing) -> Tensor:
        drawn = torch.randint(layer.num_experts, (len(routing.gates),), generator=generator)
        return drawn.to(routing.gates.device)

    def most_loaded(layer: MoELayer, routing: Routing) -> Tensor:
        return _all(int(loads[layer].argmax()), routing)

    def only(expert: int) -> Choice:
        return lambda layer, routing: _all(expert, routing)

    number = min(layer.num_experts for layer in layers)
    choices = {"learned": own, "random": random, **{str(e): only(e) for e in range(number)}}
    with undisturbed(model):
        found = _score(model, batches, choices) | _score(
            model, batches, {"most_loaded": most_loaded}
        )
    singles = [found.pop(str(e)) for e in range(number)]
    losses = [single["loss"] for single in singles]
    best = min(range(number), key=lambda e: (math.isnan(losses[e]), losses[e]))
    return found | {"best": {**singles[best], "expert": best}}


def _all(expert: int, routing: Routing) -> Tensor:
    """[B] the same expert for every image."""
    return torch.full((len(routing.gates),), expert, device=routing.gates.device)


def _score(
    model: nn.Module, batches: Batches, choices: dict[str, Choice]
) -> dict[str, dict[str, float]]:
    """Mean loss and accuracy under each choice."""
    sums = {name: [0.0, 0] for name in choices}
    images_seen = 0
    for images, labels in batches():
        images_seen += len(images)
        for name, choose in choices.items():
            with routed_by(model, choose):
                logits = wide(model(images))
            sums[name][0] += float(F.cross_entropy(logits, labels, reduction="sum"))
            sums[name][1] += int((logits.argmax(dim=1) == labels).sum())
    return {
        name: {"loss": loss / images_seen, "accuracy": right / images_seen}
        for name, (loss, right) in sums.items()
    }

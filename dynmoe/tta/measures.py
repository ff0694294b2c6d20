"""What adapted models do: right answers, use and likeness of experts, worth of the routing.

Shapes: B images in a batch, E experts of a layer, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.diagnostics import entropy, routing_stats
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.model import moe_layers, undisturbed
from dynmoe.moe.router import Routing, hard_routing
from dynmoe.plasticity.calibration import calibration, confidences
from dynmoe.tta.entropy import wide
from dynmoe.tta.norm import MoELayerNorm


class Tally:
    """Counts.

    Args:
        names: the domains.
        window: batches that make one point of the curve.
    """

    def __init__(self, names: list[str], window: int) -> None:
        self.names, self.window = names, window
        self.correct = torch.zeros(len(names), dtype=torch.int64)
        self.seen = torch.zeros(len(names), dtype=torch.int64)
        self.curve: list[float] = []
        self._open = [0, 0, 0]  # right answers, images and batches of the window under way
        self._confidence: list[float] = []  # of every image
        self._right: list[bool] = []

    def add(self, logits: Tensor, labels: Tensor, domains: Tensor) -> bool:
        """Count a batch: logits [B, classes], labels [B], domains [B].

        Returns:
            whether it closed a window, whose accuracy then is the last of `curve`.
        """
        confidence, right = confidences(logits, labels)
        self._confidence += confidence.tolist()
        self._right += right.tolist()
        self.correct += torch.bincount(domains[right], minlength=len(self.names))
        self.seen += torch.bincount(domains, minlength=len(self.names))
        hits, images, batches = self._open
        self._open = [hits + int(right.sum()), images + len(right), batches + 1]
        if batches + 1 < self.window:
            return False
        self.curve.append(self._open[0] / self._open[1])
        self._open = [0, 0, 0]
        return True

    @property
    def accuracy(self) -> float:
        """Share of right answers among all images so far (micro average)."""
        return int(self.correct.sum()) / max(int(self.seen.sum()), 1)

    def calibration(self) -> dict[str, float]:
        """`ece` and `adaptive_ece` of all images so far, see `dynmoe.plasticity.calibration`.

        Empty after a checkpoint that was written before confidences were noted.
        """
        if len(self._right) < int(self.seen.sum()):
            return {}
        sure = torch.tensor(self._confidence, dtype=torch.float64)
        return calibration(sure, torch.tensor(self._right))

    def domains(self) -> dict[str, dict[str, float]]:
        """Per domain: images seen, and the share of right answers."""
        counts = zip(self.names, self.seen.tolist(), self.correct.tolist(), strict=True)
        return {name: {"images": n, "accuracy": c / n} for name, n, c in counts if n}

    def state_dict(self) -> dict[str, Any]:
        """All counts; plain values."""
        return {"correct": self.correct.tolist(), "seen": self.seen.tolist(),
                "curve": list(self.curve), "open": list(self._open),
                "confidence": list(self._confidence), "right": list(self._right)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.correct, self.seen = torch.tensor(state["correct"]), torch.tensor(state["seen"])
        self.curve, self._open = list(state["curve"]), list(state["open"])
        self._confidence = list(state.get("confidence", []))
        self._right = list(state.get("right", []))


def moe_norms(model: nn.Module) -> list[tuple[str, MoELayerNorm]]:
    """(name, layer) of the MoELayerNorms, in module order: from shallow to deep."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, MoELayerNorm)]


def use_of_experts(model: nn.Module) -> dict[str, float]:
    """Means over the MoE layers of how the latest batch used the experts; empty without any.

    Returns:
        balance: entropy of the experts' loads over log E; 1 even, 0 one expert takes all.
        largest_share: load of the most loaded expert.
        used_experts: experts with more than a tenth of an even share.
        router_entropy: entropy of each sample's router probabilities over log E; 1 undecided.
    """
    stats = list(routing_stats(model).values())
    if not stats:
        return {}
    keys = {"balance": "balance", "largest_share": "load_max", "used_experts": "used_experts"}
    use = {new: sum(s[old] for s in stats) / len(stats) for new, old in keys.items()}
    routings = [layer.last_routing for _, layer in moe_layers(model) if layer.last_routing]
    certainties = [
        float(r.mean(entropy(r.probabilities.detach().double())) / r.active.sum().log())
        for r in routings
        if int(r.active.sum()) > 1 and (r.mask is None or bool(r.mask.any()))
    ]
    if certainties:
        use["router_entropy"] = sum(certainties) / len(certainties)
    return use


def similarity(experts: Tensor) -> float | None:
    """Mean cosine over all pairs of experts [E, D]; None while fewer than two have moved."""
    moved = experts[experts.norm(dim=1) > 0]
    if len(moved) < 2:
        return None
    unit = F.normalize(moved.double(), dim=1)
    cosines = unit @ unit.T
    pairs = torch.triu_indices(len(moved), len(moved), offset=1)
    return float(cosines[pairs[0], pairs[1]].mean())


@torch.no_grad()
def expert_similarity(model: nn.Module) -> list[float | None]:
    """`similarity` of each MoE layer's experts, scale and shift together, from shallow to deep."""
    return [
        similarity(torch.cat([m.experts_weight, m.experts_bias], dim=1)[: m.layer.num_experts])
        for _, m in moe_norms(model)
    ]


Choice = Callable[[MoELayer, Routing], Tensor | None]
"""A layer and its own routing -> the expert of each image instead, int64 [B]; None: as it is."""
Batches = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""Gives batches again: images [B, C, H, W], labels [B] and domains int64 [B], on the model's
device."""


@contextmanager
def routed_by(model: nn.Module, choose: Choice) -> Iterator[None]:
    """Let `choose` pick the expert of each image in every MoELayerNorm, within the block."""

    def replace(layer: MoELayer, _: nn.Module, args: tuple[Any, ...], own: Routing) -> Routing:
        expert = choose(layer, own)
        if expert is None:
            return own
        everywhere = torch.ones_like(expert, dtype=torch.bool)
        return hard_routing(expert, everywhere, own.active, own.gates)

    layers = [norm.layer for _, norm in moe_norms(model)]
    handles = [at.router.register_forward_hook(partial(replace, at)) for at in layers]
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
        learned: the model's own, of `top_k` experts where it takes several; the others take one.
        random: in every layer each image gets an expert drawn uniformly, independently.
        most_loaded: in every layer all images get the one that most of them get when learned.
        best: all images get one number e in every layer, that of least loss, chosen in hindsight
            by the labels; `expert` is e. Numbers of different layers have nothing to do with each
            other, so these are E of the many ways to use one expert per layer.
        by_domain: oracle; all images of a domain get the number of least loss on that domain.
        by_image: oracle; each image gets the number of least loss on it. As the labels choose, it
            is above what a router could do, also with experts that are worth nothing.
    """
    layers = [norm.layer for _, norm in moe_norms(model)]
    if not layers:
        return {}
    loads = {layer: torch.zeros(layer.max_experts, dtype=torch.int64) for layer in layers}

    def own(layer: MoELayer, routing: Routing) -> None:
        loads[layer] += routing.picks().sum(dim=0).long().cpu()

    def random(layer: MoELayer, routing: Routing) -> Tensor:
        drawn = torch.randint(layer.num_experts, (len(routing.gates),), generator=generator)
        return drawn.to(routing.gates.device)

    def only(expert: int) -> Choice:
        return lambda _, own: torch.full((len(own.gates),), expert, device=own.gates.device)

    def most_loaded(layer: MoELayer, routing: Routing) -> Tensor | None:
        return only(int(loads[layer].argmax()))(layer, routing)

    number = min(layer.num_experts for layer in layers)
    choices: dict[str, Choice] = {"learned": own, "random": random}
    choices |= {str(e): only(e) for e in range(number)}
    with undisturbed(model):
        found, domains = _score(model, batches, choices)
        found |= _score(model, batches, {"most_loaded": most_loaded})[0]  # as counted just now
    singles = torch.stack([found.pop(str(e)) for e in range(number)])
    return {name: _mean(rows) for name, rows in found.items()} | _in_hindsight(singles, domains)


def _in_hindsight(singles: Tensor, domains: Tensor) -> dict[str, dict[str, float]]:
    """`best`, `by_domain` and `by_image` of `usefulness`.

    Args:
        singles: [E, 2, N] loss and right answers of each image, all layers using number e.
        domains: [N] of the images.
    """
    losses = singles[:, 0].mean(dim=1).tolist()
    best = min(range(len(losses)), key=lambda e: (math.isnan(losses[e]), losses[e]))
    scores = {"best": _mean(singles[best]) | {"expert": best}}
    known = singles[:, 0].nan_to_num(nan=math.inf)  # [E, N]
    by_domain = known.clone()
    for domain in domains.unique():
        mine = domains == domain
        by_domain[:, mine] = known[:, mine].mean(dim=1, keepdim=True)
    for name, loss in {"by_domain": by_domain, "by_image": known}.items():
        chosen = loss.argmin(dim=0).view(1, 1, -1).expand(1, 2, -1)
        scores[name] = _mean(singles.gather(0, chosen)[0])
    return scores


def _mean(rows: Tensor) -> dict[str, float]:
    """Mean loss and accuracy of rows [2, N]."""
    loss, right = rows.mean(dim=1).tolist()
    return {"loss": loss, "accuracy": right}


def _score(
    model: nn.Module, batches: Batches, choices: dict[str, Choice]
) -> tuple[dict[str, Tensor], Tensor]:
    """Under each choice [2, N] loss of each image, and whether it is right; and the domains [N].

    Float64, on the CPU.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in choices}
    numbers: list[Tensor] = []
    for images, labels, domains in batches():
        numbers.append(domains.cpu())
        for name, choose in choices.items():
            with routed_by(model, choose):
                logits = wide(model(images))
            loss = F.cross_entropy(logits, labels, reduction="none")
            right = logits.argmax(dim=1) == labels
            rows[name].append(torch.stack([loss.double(), right.double()]).cpu())
    return {name: torch.cat(parts, dim=1) for name, parts in rows.items()}, torch.cat(numbers)


def kept_for_backward(model: nn.Module, images: Tensor) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward pass, but for the model's.

    images: a batch [B, C, H, W].

    The model is left as it was.
    """
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    saved: dict[int, int] = {}
    held: list[Tensor] = []  # a freed storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with undisturbed(model), torch.enable_grad(), hooks:
        model(images)
    return sum(size for place, size in saved.items() if place not in own)

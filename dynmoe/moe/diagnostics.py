"""Looking into MoE layers: how routers use experts, how alike those are, what a change has done.

Shapes: N samples, E active experts, L labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.model import moe_layers, undisturbed


def gate_shares(gates: Tensor) -> Tensor:
    """Gates [N, E] >= 0 as shares that sum to 1 per row, float64.

    Softmax gates come back unchanged; sparse and sigmoid gates are divided by their row's sum. A
    row of zeros (no expert took the sample) says nothing about any expert and becomes uniform.

    Raises:
        ValueError: not a matrix, or a gate below 0.
    """
    if gates.ndim != 2 or gates.numel() == 0:
        raise ValueError(f"gates must be a non-empty [N, E], got shape {tuple(gates.shape)}")
    if bool((gates < 0).any()):
        raise ValueError("gates must not be negative")
    gates = gates.double()
    total = gates.sum(dim=1, keepdim=True)
    uniform = torch.full_like(gates, 1.0 / gates.shape[1])
    return torch.where(total > 0, gates / total.clamp_min(torch.finfo(torch.double).tiny), uniform)


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy over the last axis, nats, with 0 log 0 = 0: `[..., E] -> [...]`."""
    return -torch.special.xlogy(p, p).sum(dim=-1)


def expert_use(gates: Tensor, created: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """How a batch's gates [N, E] use the experts, made at growths `created` [E].

    Gates are taken as shares (rows sum to 1); expert e's load is its mean share.

    Args:
        mask: [N] bool, False for padding, which does not count; None: all samples are real.

    Returns:
        Nothing where no sample is real, else
        entropy: mean over samples of H(gates) / log E, in 0..1; 0 = each sample uses one expert.
        balance: H(load) / log E, in 0..1; 1 = all experts carry the same load.
        load_max, load_min: largest and smallest load.
        used_experts: number with load > 1 / (10 E).
        dead_experts: number with load < .01 (on this batch).
        newest_share: total load of the newest experts; 1 before the first growth.
        A single expert has entropy 0 and balance 1 by definition.
    """
    if mask is not None:
        gates = gates[mask]
        if not len(gates):
            return {}
    shares = gate_shares(gates)
    load, count = shares.mean(dim=0), shares.shape[1]
    log_e = math.log(count) if count > 1 else 1.0
    values = {
        "entropy": entropy(shares).mean() / log_e,
        "balance": entropy(load) / log_e if count > 1 else load.new_ones(()),
        "load_max": load.max(),
        "load_min": load.min(),
        "used_experts": (load > 1 / (10 * count)).sum(),
        "dead_experts": (load < 0.01).sum(),
        "newest_share": load[created == created.max()].sum(),
    }
    return {name: float(value) for name, value in values.items()}


def label_uncertainty(
    gates: Tensor, labels: Tensor, weighted: bool = False
) -> tuple[float, list[float]]:
    """Entropy of the labels of all samples, and of those that each expert takes, in nats.

    `H(label)` and `H(label | S_e)`; their difference `I(label; e)` is what expert e tells of the
    label (Zhang et al. 2025, arXiv 2507.11181, Eq. 16). It is below 0 for an expert whose samples
    are more mixed than all are. The plug-in estimate: few samples make entropies too small.

    Args:
        gates: [N, E], of real samples.
        labels: [N] int64, of classes, tasks, ...; or one for every N / len(labels) rows, as where
            each token of a sample is routed.
        weighted: False: S_e are the samples whose gate for e is above 0 (Eq. 16). Dense gates are
            never 0, so that every S_e is the whole batch; True weighs samples by their gate shares.

    Returns:
        The labels' entropy, and one for each of the E experts; nan for an expert without samples.
    """
    weights = gate_shares(gates) if weighted else (gates > 0).double()
    label, number = row_labels(labels, len(gates)).to(gates.device).unique(return_inverse=True)
    member = F.one_hot(number, len(label)).double()
    taken = weights.T @ member  # [E, L]
    own = entropy(taken / taken.sum(dim=1, keepdim=True))
    return float(entropy(member.mean(dim=0))), own.tolist()


def row_labels(labels: Tensor, rows: int) -> Tensor:
    """Labels [B] as one for each of `rows` rows, of which a sample has rows / B.

    Raises:
        ValueError: the rows cannot be divided among the labels.
    """
    if not len(labels) or rows % len(labels):
        raise ValueError(f"{len(labels)} labels cannot belong to {rows} routed rows")
    return labels.repeat_interleave(rows // len(labels))


def routing_stats(model: nn.Module, labels: Tensor | None = None) -> dict[str, dict[str, float]]:
    """`expert_use` of each MoE layer's latest forward pass, by layer name; padding does not count.

    Layers that have not run yet, or saw padding only, are left out.

    Args:
        labels: [B] of that pass's samples, padding included, as `label_uncertainty` takes them.
            They add `label_entropy`, and for each expert e that some sample uses
            `label_entropy/expert_<e>` and `label_information/expert_<e>` (Eq. 16), nats.
    """
    found = {}
    for name, layer in moe_layers(model):
        routing = layer.last_routing
        if routing is None:
            continue
        gates = routing.gates.detach()[:, : layer.num_experts]
        use = expert_use(gates, layer.created[: layer.num_experts], routing.mask)
        if use and labels is not None:
            own = routing.real(row_labels(labels, len(gates)).to(gates.device))
            whole, parts = label_uncertainty(routing.real(gates), own)
            use["label_entropy"] = whole
            for expert, part in enumerate(parts):
                if not math.isnan(part):
                    use[f"label_entropy/expert_{expert}"] = part
                    use[f"label_information/expert_{expert}"] = whole - part
        if use:
            found[name] = use
    return found


@torch.no_grad()
def weight_similarity(layer: MoELayer) -> Tensor:
    """How alike the active experts' weights are: [E, E] float64 on the CPU, 1 on the diagonal.

    Banks with hidden units: `||W_i W_j^T||^2 / (||W_i W_i^T|| ||W_j W_j^T||)` with Frobenius norms,
    W_e the expert's units as rows, each with all its weights and biases but the output's. It is
    the cosine of the matrices `W_e^T W_e`, lies in 0..1, and knows no order of units; experts of
    different sizes compare; of bottlenecked experts these are the first layers' units. Other banks:
    cosine of all of an expert's parameters, in -1..1. Both are our choice. An expert of zeros has
    similarity 0 to all.
    """
    bank, experts = layer.bank, range(layer.num_experts)
    if isinstance(bank, BottleneckBank):
        first = [own[:2] for own in bank.maps(bank.weights.double()).by_expert()]
        return _overlaps([torch.cat([w, b.unsqueeze(1)], dim=1).T for w, b in first])
    if not isinstance(bank, UnitBank):
        rows = torch.cat([p.flatten(1).double() for p in bank.expert_rows()], dim=1)
        rows = F.normalize(rows[: len(experts)], dim=1)
        return (rows @ rows.T).cpu()
    inner = [(getattr(bank, name), axis) for name, axis in bank.unit_axes()]
    sides = [
        parameter.movedim(axis, 0).reshape(len(bank.segment), -1).double()
        for parameter, axis in inner
        if parameter is not bank.output_weight()
    ]
    units = torch.cat(sides, dim=1)
    return _overlaps([units[bank.segment == e].T for e in experts])


@torch.no_grad()
def output_similarity(layer: MoELayer, x: Tensor, how: Literal["cosine", "cka"]) -> Tensor:
    """How alike the active experts' outputs on x are: [E, E] float64 on the CPU.

    Args:
        x: input of the layer; every position of a sample counts as a sample.
        how: "cosine": mean over samples of the cosine of two experts' outputs, in -1..1. "cka":
            linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, Section 3),
            in 0..1: blind to rotations and scale of the outputs. An expert of constant output has
            0 to all.

    Raises:
        UserError: an unknown `how`.
    """
    if how not in ("cosine", "cka"):
        raise UserError(f"output_similarity: how={how!r} must be 'cosine' or 'cka'")
    with undisturbed(layer):
        rows = x if layer.bank.per_sample else x.reshape(-1, x.shape[-1])
        outputs = layer.bank.expert_outputs(rows)[: layer.num_experts].double()
    axis = layer.bank.channel_axis if layer.bank.per_sample else -1
    features = [y.movedim(axis, -1).flatten(0, -2) for y in outputs]  # each [N, D]
    if how == "cka":
        return _overlaps([y - y.mean(dim=0) for y in features])
    unit = F.normalize(torch.stack(features), dim=2)
    return (unit.flatten(1) @ unit.flatten(1).T).cpu() / unit.shape[1]


def _overlaps(matrices: list[Tensor]) -> Tensor:
    """[E, E] of `||A_i^T A_j||^2 / (||A_i^T A_i|| ||A_j^T A_j||)` (Frobenius) for A_e [N, D_e]."""
    table = torch.zeros(len(matrices), len(matrices), dtype=torch.double)
    for i, a in enumerate(matrices):
        for j, b in enumerate(matrices[: i + 1]):
            table[i, j] = table[j, i] = (a.T @ b).square().sum()
    own = table.diagonal().sqrt()
    return table / torch.outer(own, own).clamp_min(torch.finfo(torch.double).tiny)


def routing_table(
    gates: Tensor, labels: Tensor, num_labels: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean gate share of each expert on the samples of each label: [E, L] float64 on the CPU.

    Columns sum to 1; that of a label without samples is nan.

    Args:
        gates: [N, E].
        labels: [N] int64, as `label_uncertainty` takes them.
        num_labels: L; by default one more than the largest label.
        mask: [N] bool, False for padding, which does not count; None: all samples are real.
    """
    shares = gate_shares(gates).cpu()
    labels = row_labels(labels.cpu(), len(shares))
    if mask is not None:
        shares, labels = shares[mask.cpu()], labels[mask.cpu()]
    member = F.one_hot(labels, -1 if num_labels is None else num_labels).double()
    return (shares.T @ member) / member.sum(dim=0)


@torch.no_grad()
def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each MoE layer is given while the model computes x, [..., D] by layer name.

    In evaluation mode; the model is left as it was. A layer that runs twice gives its last input.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = (args[0] if args else kwargs["x"]).detach().clone()

    handles = [
        layer.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, layer in moe_layers(model)
    ]
    try:
        with undisturbed(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass(frozen=True)
class FunctionChange:
    """What became of the outputs y when a module was replaced; dy is the difference."""

    largest: float
    """max |dy|, in the unit of the outputs"""
    relative: float
    """||dy|| / ||y||, over all outputs at once; 0 where both are 0"""
    cosine: float
    """of the two output tensors, flattened; 1 where the replacement differs by a factor only"""


def output_change(before: Tensor, after: Tensor) -> FunctionChange:
    """Compare outputs of equal shape; worked out in float64.

    `relative` is what a growth reports as `output_change`.
    """
    before, after = before.double().flatten(), after.double().flatten()
    difference = (after - before).abs()
    size, norm = before.norm(), difference.norm()
    return FunctionChange(
        largest=float(difference.max()),
        relative=float(norm / size) if norm > 0 else 0.0,
        cosine=float(F.cosine_similarity(before, after, dim=0)) if norm > 0 else 1.0,
    )


@torch.no_grad()
def function_change(before: nn.Module, after: nn.Module, x: Tensor) -> FunctionChange:
    """Compare what two modules make of x, in evaluation mode; both are left as they were.

    x has a shape that both take, and their outputs have one shape.
    """
    with undisturbed(before):
        old = before(x)
    with undisturbed(after):
        new = after(x)
    return output_change(old, new)


def most_experts(model: nn.Module) -> int:
    """Experts of the largest MoE layer of a model; 1 for a model without."""
    return max((layer.num_experts for _, layer in moe_layers(model)), default=1)

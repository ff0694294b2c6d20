"""How routers use their experts: sharpness, balance, load, idle and new experts, labels' share.

Shapes: N samples, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.layer import moe_layers


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
        ValueError: the rows cannot be shared out among the labels.
    """
    if not len(labels) or rows % len(labels):
        raise ValueError(f"{len(labels)} labels cannot belong to {rows} routed rows")
    return labels.repeat_interleave(rows // len(labels))


def routing_stats(model: nn.Module, labels: Tensor | None = None) -> dict[str, dict[str, float]]:
    """`expert_use` of each MoE layer's latest forward pass, by layer name; padding does not count.

    Layers that have not run yet, or saw padding only, are left out.

    Args:
        labels: of that pass's samples, padding included, as `label_uncertainty` takes them. They
            add `label_entropy`, and for each expert e that some sample uses
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
            use |= _label_values(routing.real(gates), own)
        if use:
            found[name] = use
    return found


def _label_values(gates: Tensor, labels: Tensor) -> dict[str, float]:
    """What `routing_stats` says about labels [N]."""
    whole, own = label_uncertainty(gates, labels)
    values = {"label_entropy": whole}
    for expert, uncertainty in enumerate(own):
        if not math.isnan(uncertainty):
            values[f"label_entropy/expert_{expert}"] = uncertainty
            values[f"label_information/expert_{expert}"] = whole - uncertainty
    return values


def most_experts(model: nn.Module) -> int:
    """Experts of the largest MoE layer of a model; 1 for a model without."""
    return max((layer.num_experts for _, layer in moe_layers(model)), default=1)

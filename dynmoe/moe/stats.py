"""How routers use their experts: sharpness, balance, load, idle and newborn experts.

Shapes: N samples, E experts.
"""

from __future__ import annotations

import math

import torch
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


def expert_use(gates: Tensor, birth: Tensor) -> dict[str, float]:
    """How a batch's gates [N, E] use the experts, born at growths `birth` [E].

    Gates are taken as shares (rows sum to 1); expert e's load is its mean share.

    Returns:
        entropy: mean over samples of H(gates) / log E, in 0..1; 0 = each sample uses one expert.
        balance: H(load) / log E, in 0..1; 1 = all experts carry the same load.
        load_max, load_min: largest and smallest load.
        used_experts: number with load > 1 / (10 E).
        dead_experts: number with load < .01 (on this batch).
        newest_share: total load of the experts born last; 1 before the first growth.
        A single expert has entropy 0 and balance 1 by definition.
    """
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
        "newest_share": load[birth == birth.max()].sum(),
    }
    return {name: float(value) for name, value in values.items()}


def routing_stats(model: nn.Module) -> dict[str, dict[str, float]]:
    """`expert_use` of each MoE layer's latest forward pass, by layer name.

    Layers that have not run yet are left out.
    """
    return {
        name: expert_use(
            layer.last_routing.gates.detach()[:, : layer.num_experts],
            layer.birth[: layer.num_experts],
        )
        for name, layer in moe_layers(model)
        if layer.last_routing is not None
    }

"""How sharply and how evenly routers spread samples over their experts."""

from __future__ import annotations

import math

import torch

from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.probes import ExpertProbe, Probe
from dynmoe.plasticity.routing import entropy, gate_shares
from dynmoe.registry import PartConfig


class RouterUse(Metric, name="router"):
    """Router sharpness, balance, load of the busiest, idlest and newest experts, dead experts.

    Gates are taken as shares (rows sum to 1), load_e is expert e's mean share on the probe batch:
        router/entropy: mean over samples of H(g) / log E, in 0..1; 0 = each sample uses one expert.
        router/balance: H(load) / log E, in 0..1; 1 = all experts carry the same load.
        router/load_max, router/load_min: largest and smallest load.
        router/used_experts: number with load > 1 / (10 E).
        router/dead_experts: number with load < .01 (on this batch).
        router/newest_share: total load of the experts born last; 1 before the first growth.
    A single expert has entropy 0 and balance 1 by definition. With several MoE layers the plain
    tags are means over layers, and each layer has its own with `/<layer>` appended.
    """

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    def measure(self, probe: Probe) -> dict[str, float]:
        """Means over MoE layers, and values per layer if there are several."""
        layers = {name: router_use(expert) for name, expert in probe.experts.items()}
        if not layers:
            return {}
        keys = next(iter(layers.values())).keys()
        values = {f"router/{k}": sum(u[k] for u in layers.values()) / len(layers) for k in keys}
        if len(layers) > 1:
            values |= {f"router/{k}/{name}": u[k] for name, u in layers.items() for k in keys}
        return values


def router_use(expert: ExpertProbe) -> dict[str, float]:
    """The metric's values for one MoE layer, by tag without its prefix."""
    shares = gate_shares(expert.gates)
    load, count = shares.mean(dim=0), shares.shape[1]
    newest = expert.birth == expert.birth.max()
    log_e = math.log(count)
    numbers = torch.stack(
        [
            entropy(shares).mean() / log_e if count > 1 else load.new_zeros(()),
            entropy(load) / log_e if count > 1 else load.new_ones(()),
            load.max(),
            load.min(),
            (load > 1 / (10 * count)).sum(),
            (load < 0.01).sum(),
            load[newest].sum(),
        ]
    ).tolist()
    keys = ("entropy", "balance", "load_max", "load_min", "used_experts", "dead_experts")
    return dict(zip((*keys, "newest_share"), numbers, strict=True))

"""How sharply and how evenly routers spread samples over their experts."""

from __future__ import annotations

from dynmoe.moe.stats import expert_use
from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.probes import Probe
from dynmoe.registry import PartConfig


class RouterUse(Metric, name="router"):
    """Router sharpness, balance, load of the busiest, idlest and newest experts, dead experts.

    The figures of `dynmoe.moe.stats.expert_use` on the probe batch, as `router/entropy` and so on.
    With several MoE layers the plain tags are means over layers, and each layer has its own with
    `/<layer>` appended.
    """

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    def measure(self, probe: Probe) -> dict[str, float]:
        """Means over MoE layers, and values per layer if there are several."""
        layers = {name: expert_use(e.gates, e.birth) for name, e in probe.experts.items()}
        if not layers:
            return {}
        keys = next(iter(layers.values())).keys()
        values = {f"router/{k}": sum(u[k] for u in layers.values()) / len(layers) for k in keys}
        if len(layers) > 1:
            values |= {f"router/{k}/{name}": u[k] for name, u in layers.items() for k in keys}
        return values

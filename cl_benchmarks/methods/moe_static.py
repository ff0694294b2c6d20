"""A mixture of experts that never grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from cl_benchmarks.method import Horizon, Method, Training
from dynmoe import seeding
from dynmoe.growth.settings import GrowthSettings
from dynmoe.network import MakeBlock
from dynmoe.registry import PartConfig


class StaticMoE(Method, name="moe-static"):
    """All experts from the start, as many as DynamicMoE ends with: is it growth that helps?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the static mixture."""

        experts: int = 0
        """number of experts; 0 for as many as DynamicMoE ends with"""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.experts = config.experts

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """An MoE layer with its final number of experts."""
        experts = self.experts or growth.most_experts(horizon.steps, horizon.tasks)
        generator = seeding.generator(seed, "moe-layers")

        def make(width: int, hidden: int) -> nn.Module:
            growth.check_budget(hidden, experts)
            return growth.make_layer(width, width, hidden, experts, experts, generator)

        return make

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []

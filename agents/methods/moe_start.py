"""A mixture of experts that stays as it starts."""

from __future__ import annotations

from torch import nn

from agents.actor_critic import MakeBlock
from agents.agent import Agent
from dynmoe import seeding
from dynmoe.growth.settings import GrowthSettings


class MoEStart(
    Agent, name="moe-start", source='Kim 2025 (arXiv 2511.18987), its "1 expert" baseline'
):
    """The experts that DynamicMoE starts with (its "1 expert" baseline), and never more."""

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """An MoE layer of g experts; it is drawn as DynamicMoE's is, room for more included."""
        most = growth.most_experts(steps, tasks=1)
        generator = seeding.generator(seed, "moe-layers")

        def make(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
            return growth.make_layer(dim_in, dim_out, hidden, growth.granularity, most, generator)

        return make

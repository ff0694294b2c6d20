"""A mixture of experts with its full capacity from the start."""

from __future__ import annotations

from torch import nn

from agents.actor_critic import MakeBlock
from agents.agent import Agent
from dynmoe import seeding
from dynmoe.growth.settings import GrowthSettings


class MoEStatic(
    Agent, name="moe-static", source='Kim 2025 (arXiv 2511.18987), its "2 experts" baseline'
):
    """All experts that DynamicMoE ends with, from the start (its "2 experts" baseline)."""

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """An MoE layer of the final number of experts and hidden units."""
        most = growth.most_experts(steps, tasks=1)
        generator = seeding.generator(seed, "moe-layers")

        def make(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
            growth.check_budget(hidden, most)
            final = growth.final_hidden(hidden, most)
            return growth.make_layer(dim_in, dim_out, final, most, most, generator)

        return make

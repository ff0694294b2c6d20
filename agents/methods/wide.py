"""A wider plain PPO agent."""

from __future__ import annotations

from torch import nn

from agents.actor_critic import MakeBlock, dense_block
from agents.agent import Agent
from dynmoe.growth.settings import GrowthSettings


class Wide(Agent, name="wide"):
    """Dense blocks with the hidden units that DynamicMoE ends with: is it capacity that helps?"""

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """A two-layer MLP of the final width."""
        most = growth.most_experts(steps, tasks=1)

        def make(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
            return dense_block(dim_in, growth.final_hidden(hidden, most), dim_out)

        return make

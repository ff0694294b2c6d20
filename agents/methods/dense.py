"""A plain PPO agent."""

from __future__ import annotations

from agents.actor_critic import MakeBlock, dense_block
from agents.agent import Agent
from dynmoe.growth.settings import GrowthSettings


class Dense(Agent, name="dense"):
    """Dense blocks with the hidden units that DynamicMoE starts with."""

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """A two-layer MLP."""
        return dense_block

"""An agent that grows experts."""

from __future__ import annotations

from torch import nn

from agents.actor_critic import MakeBlock
from agents.agent import Agent
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.growth.settings import GrowthSettings


class DynamicMoE(Agent, name="dynamicmoe", source="Kim 2025 (arXiv 2511.18987)"):
    """Grows by `--granularity` experts whenever `--trigger` fires (Kim, arXiv 2511.18987)."""

    grows = True

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """An MoE layer of g experts with room for all that will come.

        Raises:
            UserError: it would never grow, or the budget is too small.
        """
        most = growth.most_experts(steps, tasks=1)
        if most == growth.granularity:
            raise UserError(
                f"trigger {growth.trigger.part.name} never fires in {steps} environment steps; "
                "set its options (--trigger.steps ...), or take --method moe-start"
            )
        generator = seeding.generator(seed, "moe-layers")

        def make(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
            growth.check_budget(hidden, most)
            return growth.make_layer(dim_in, dim_out, hidden, growth.granularity, most, generator)

        return make

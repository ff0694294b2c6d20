"""What an agent is compared with: networks with and without growth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from agents.actor_critic import MakeBlock, dense_block
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.growth.settings import GROWTH, LAYER, PLAN, GrowthSettings
from dynmoe.registry import Part, PartConfig


class Agent(Part, ABC, kind="agent"):
    """Base of all agents. They differ in the blocks of their network, and in what they do at all.

    Attributes:
        grows: experts are added while it learns.
        learns: its network is trained.
        acts: it follows its network; else it takes every action equally often.
        reads: the growth settings that it uses; giving others is refused.
    """

    grows: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    acts: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (*LAYER, *GROWTH)

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """The maker of the blocks, (input width, hidden units, output width) -> module.

        Args:
            growth: what the layers look like and how they grow.
            steps: environment steps of the run.
            seed: of the blocks' own random numbers.

        Raises:
            UserError: the settings cannot work, found before any training.
        """


class Dense(Agent, name="dense"):
    """Dense blocks with the hidden units that DynamicMoE starts with."""

    reads = ()

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """A two-layer MLP."""
        return dense_block


class Wide(Agent, name="wide"):
    """Dense blocks with the hidden units that DynamicMoE ends with: is it capacity that helps?"""

    reads = ("bank", *PLAN)

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """A two-layer MLP of the final width."""
        most = growth.most_experts(steps, tasks=1)
        return lambda dim_in, hidden, dim_out: dense_block(
            dim_in, growth.final_hidden(hidden, most), dim_out
        )


class MoEStart(
    Agent, name="moe-start", source='Kim 2025 (arXiv 2511.18987), its "1 expert" baseline'
):
    """The experts that DynamicMoE starts with (its "1 expert" baseline), and never more."""

    reads = (*LAYER, *PLAN)

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """An MoE layer of g experts; it is drawn as DynamicMoE's is, room for more included."""
        most = growth.most_experts(steps, tasks=1)
        generator = seeding.generator(seed, "moe-layers")

        def make(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
            hidden = growth.budget.first_hidden(hidden, growth.granularity, most)
            return growth.make_layer(dim_in, dim_out, hidden, growth.granularity, most, generator)

        return make


class MoEStatic(
    Agent, name="moe-static", source='Kim 2025 (arXiv 2511.18987), its "2 experts" baseline'
):
    """All experts that DynamicMoE ends with, from the start (its "2 experts" baseline)."""

    reads = (*LAYER, *PLAN)

    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """An MoE layer of the final number of experts and hidden units."""
        most = growth.most_experts(steps, tasks=1)
        generator = seeding.generator(seed, "moe-layers")

        def make(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
            growth.check_budget(hidden, most)
            final = growth.final_hidden(hidden, most)
            return growth.make_layer(dim_in, dim_out, final, most, most, generator)

        return make


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
            hidden = growth.budget.first_hidden(hidden, growth.granularity, most)
            return growth.make_layer(dim_in, dim_out, hidden, growth.granularity, most, generator)

        return make


class Random(Dense, name="random"):
    """Every action equally often: the floor that any learning must leave."""

    learns = False
    acts = False


class Untrained(Dense, name="untrained"):
    """The dense network as it is drawn: what acting without learning returns."""

    learns = False

"""DynamicMoE: experts are added at growth events under a parameter budget."""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.method import Horizon, Method, Training
from cl_benchmarks.networks import MakeBlock
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.growth.settings import GrowthSettings


class DynamicMoE(Method, name="dynamicmoe", source="Kim 2025 (arXiv 2511.18987)"):
    """Grows by `--granularity` experts whenever `--trigger` fires (Kim, arXiv 2511.18987)."""

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """An MoE layer of g experts with room for all that will come.

        Raises:
            UserError: it would never grow, or the budget is too small.
        """
        most = growth.most_experts(horizon.steps, horizon.tasks)
        if most == growth.granularity:
            raise UserError(
                f"trigger {growth.trigger.part.name} never fires in {horizon.steps} steps and "
                f"{horizon.tasks} task(s); use another --trigger or its options "
                "(--trigger.steps ...), more --chunks, or --method moe-static"
            )
        generator = seeding.generator(seed, "moe-layers")

        def make(width: int, hidden: int) -> nn.Module:
            growth.check_budget(hidden, most)
            return growth.make_layer(width, width, hidden, growth.granularity, most, generator)

        return make

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The growth plugin."""
        controller = growth.make_controller(training.model, training.optimizer, training.generator)
        return [GrowthPlugin(controller)]

"""A mixture of experts that is drawn anew at each task instead of growing."""

from __future__ import annotations

from typing import Any

import torch

from cl_benchmarks.method import ConstantMoE, Training
from dynmoe.growth.optimizer_state import mean_moments, neutral_state
from dynmoe.growth.settings import GrowthSettings
from dynmoe.moe import UnitBank, moe_layers


class RenewedMoE(ConstantMoE, name="moe-renewed", source="ours"):
    """A constant number of experts, all drawn afresh at each task: is it growth, or renewal?

    With the cut `redraw`, growth draws every expert and router row anew, too; what is left between
    the two is that experts become more. The rest of the network learns on as it does there.
    """

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that draws the experts."""
        return [RenewExperts(training)]


class RenewExperts:
    """Avalanche plugin: fresh experts and router rows at the start of each later task."""

    def __init__(self, training: Training) -> None:
        self.training = training

    @torch.no_grad()
    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Draw all experts, in place, with neutral optimizer state, as a growth would."""
        if strategy.clock.train_exp_counter == 0 or getattr(strategy, "resuming", False):
            return
        generator, optimizer = self.training.generator, self.training.optimizer
        for layer in dict(moe_layers(strategy.model)).values():
            every = torch.arange(layer.num_experts, device=layer.birth.device)
            slots = [(rows, 0, every) for rows in layer.bank.expert_rows()]
            slots += [(rows, 0, every) for rows in layer.router.expert_rows()]
            layer.router.draw_rows(every, generator)
            layer.bank.draw_experts(every, generator)
            if isinstance(layer.bank, UnitBank):
                units = torch.arange(len(layer.bank.segment), device=every.device)
                layer.bank.draw_units(units, generator)
                axes = layer.bank.unit_axes()
                slots += [(getattr(layer.bank, name), axis, units) for name, axis in axes]
            for parameter, axis, index in slots:
                means = mean_moments(optimizer, parameter, "mean")
                neutral_state(optimizer, parameter, axis, index, means)

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands."""
        return {"generator": self.training.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.training.generator.set_state(state["generator"])

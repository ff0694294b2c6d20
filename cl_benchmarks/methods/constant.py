"""Methods whose network keeps its shape, or is a new one for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cl_benchmarks.method import ConstantMoE, DenseMethod, Horizon, Method, Training
from cl_benchmarks.networks import MakeBlock, dense_block
from dynmoe.errors import UserError
from dynmoe.growth.optimizer_state import mean_moments, neutral_state
from dynmoe.growth.settings import GrowthSettings
from dynmoe.moe import UnitBank, moe_layers
from dynmoe.registry import PartConfig


class Dense(DenseMethod, name="dense"):
    """The same network with a dense block of as many hidden units; trained on without a break."""

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []


class Wide(Method, name="wide"):
    """A dense block several times as wide, from the start: does more capacity alone help?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the wide network."""

        factor: int = 4
        """hidden units, as a multiple of the other methods'"""

    def __init__(self, config: Config) -> None:
        if config.factor < 1:
            raise UserError(f"method wide: factor={config.factor} must be at least 1")
        super().__init__(config)
        self.factor = config.factor

    def reads(self) -> tuple[str, ...]:
        """None."""
        return ()

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A dense block of `factor` times the hidden units."""

        def make(width: int, hidden: int) -> nn.Module:
            return dense_block(width, hidden * self.factor)

        return make

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []


class StaticMoE(ConstantMoE, name="moe-static"):
    """All experts from the start, as many as DynamicMoE ends with: is it growth that helps?"""

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []


class RenewedMoE(ConstantMoE, name="moe-renewed", source="ours"):
    """A constant number of experts, all re-initialised at each task: is it growth, or renewal?

    With the pruning `reinit`, growth re-initialises every expert and router row, too; what is left
    between the two is that experts become more. The rest of the network learns on as it does there.
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
            every = torch.arange(layer.num_experts, device=layer.created.device)
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


class Fresh(DenseMethod, name="fresh"):
    """The dense network and optimizer re-initialised at every task: full plasticity."""

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that renews the network.

        Raises:
            UserError: the intervention changes the network's make on the way.
        """
        if training.intervention.reshapes:
            raise UserError(
                f"method fresh draws a new network for each task, so intervention "
                f"{training.intervention.name} has nothing to work on; use --method dense"
            )
        return [RenewPlugin(training)]


class RenewPlugin:
    """Avalanche plugin: fresh weights and optimizer state at the start of each later task."""

    def __init__(self, training: Training) -> None:
        self.training = training

    @torch.no_grad()
    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Renew everything, in place, unless this is the first task or a resumed one."""
        task = strategy.clock.train_exp_counter
        if task == 0 or getattr(strategy, "resuming", False):
            return
        fresh = self.training.new_model(task).to(strategy.device)
        strategy.model.load_state_dict(fresh.state_dict())
        self.training.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: networks are drawn by task number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

"""A new network for every task: what each task allows when nothing came before."""

from __future__ import annotations

from typing import Any

import torch

from cl_benchmarks.method import DenseMethod, Training
from dynmoe.errors import UserError
from dynmoe.growth.settings import GrowthSettings


class Fresh(DenseMethod, name="fresh"):
    """The dense network drawn anew, optimizer too, at every task: the level of full plasticity."""

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that renews the network.

        Raises:
            UserError: the strategy changes the network's make on the way.
        """
        if training.strategy.reshapes:
            raise UserError(
                f"method fresh draws a new network for each task, so strategy "
                f"{training.strategy.name} has nothing to work on; use --method dense"
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

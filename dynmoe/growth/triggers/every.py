"""Grow on a clock."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.errors import UserError
from dynmoe.growth.trigger import Signals, Trigger
from dynmoe.registry import PartConfig


class EveryTrigger(Trigger, name="every"):
    """Every n optimizer steps (DynamicMoE's reinforcement learning grows every 500M env steps)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the clock trigger."""

        steps: int = 1000
        """optimizer steps between growths"""

    def __init__(self, config: Config) -> None:
        if config.steps < 1:
            raise UserError(f"trigger every: steps={config.steps} must be at least 1")
        super().__init__(config)
        self.steps = config.steps

    def fires(self, signals: Signals) -> bool:
        """Whether the step is a positive multiple of n. Task starts are no step of their own."""
        return not signals.task_starts and signals.step > 0 and signals.step % self.steps == 0

    def planned(self, steps: int, tasks: int) -> int:
        """Multiples of n before the last step: a growth at the very end could learn nothing."""
        return max(0, steps - 1) // self.steps

"""Grow on a clock."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.errors import UserError
from dynmoe.growth.trigger import ClockTrigger
from dynmoe.registry import PartConfig


class EveryTrigger(ClockTrigger, name="every", source="Kim 2025 (arXiv 2511.18987)"):
    """Every n steps of the clock (DynamicMoE's RL: 500M environment steps, 2511.18987)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the clock trigger."""

        steps: int = 1000
        """steps between growths (optimizer steps in cl, env steps in rl)"""

    def __init__(self, config: Config) -> None:
        if config.steps < 1:
            raise UserError(f"trigger every: steps={config.steps} must be at least 1")
        super().__init__(config)
        self.steps = config.steps

    def due(self, before: int, now: int) -> bool:
        """Whether a multiple of n lies in (before, now]."""
        return now // self.steps > before // self.steps

    def planned(self, steps: int, tasks: int) -> int:
        """Multiples of n before the last step: a growth at the very end could learn nothing."""
        return max(0, steps - 1) // self.steps

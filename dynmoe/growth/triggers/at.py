"""Grow at given steps."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.errors import UserError
from dynmoe.growth.trigger import ClockTrigger
from dynmoe.registry import PartConfig


class AtTrigger(ClockTrigger, name="at"):
    """At the given steps of the clock."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the given-steps trigger."""

        steps: tuple[int, ...] = ()
        """steps after which to grow, each at least 1 (optimizer steps in cl, env steps in rl)"""

    def __init__(self, config: Config) -> None:
        if not config.steps or min(config.steps) < 1 or len(set(config.steps)) < len(config.steps):
            raise UserError(
                f"trigger at: steps={list(config.steps)} must be distinct numbers of at least 1, "
                "for example --trigger.steps 500 1000"
            )
        super().__init__(config)
        self.steps = frozenset(config.steps)

    def due(self, before: int, now: int) -> bool:
        """Whether one of the given steps lies in (before, now]; two there are one growth."""
        return any(before < step <= now for step in self.steps)

    def planned(self, steps: int, tasks: int) -> int:
        """How many of the given steps come before the run's last one."""
        return sum(s < steps for s in self.steps)

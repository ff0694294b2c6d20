"""Grow at given steps."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.errors import UserError
from dynmoe.growth.trigger import Signals, Trigger
from dynmoe.registry import PartConfig


class AtTrigger(Trigger, name="at"):
    """At the given optimizer steps."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the given-steps trigger."""

        steps: tuple[int, ...] = ()
        """optimizer steps after which to grow, each at least 1"""

    def __init__(self, config: Config) -> None:
        if not config.steps or min(config.steps) < 1 or len(set(config.steps)) < len(config.steps):
            raise UserError(
                f"trigger at: steps={list(config.steps)} must be distinct numbers of at least 1, "
                "for example --trigger.steps 500 1000"
            )
        super().__init__(config)
        self.steps = frozenset(config.steps)

    def fires(self, signals: Signals) -> bool:
        """Whether the step is one of those given."""
        return not signals.task_starts and signals.step in self.steps

    def planned(self, steps: int, tasks: int) -> int:
        """How many of the given steps come before the run's last one."""
        return sum(s < steps for s in self.steps)

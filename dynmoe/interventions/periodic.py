"""Interventions that act now and then: at each task start, or every so many optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Batches, Intervention
from dynmoe.registry import PartConfig


class Periodic(Intervention, ABC):
    """Base of those interventions; `act` is what they do.

    Raises:
        UserError: `every` is below 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of interventions that act now and then."""

        every: int = 0
        """optimizer steps between two actions, for loops without tasks; 0 for at each task start"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.every < 0:
            raise UserError(f"{self.name}: every={config.every} must be at least 0")

    @abstractmethod
    def act(self) -> None:
        """Change the network in place."""

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Act, unless steps are counted."""
        if not self.config.every:
            self.act()

    def after_step(self) -> None:
        """Act when it is time, if steps are counted."""
        if self.config.every and self.steps % self.config.every == 0:
            self.act()

    def without_tasks(self) -> str | None:
        """It must count steps there."""
        if self.config.every:
            return None
        return (
            f"intervention {self.name} acts at task starts, and there are none here; set its every"
        )

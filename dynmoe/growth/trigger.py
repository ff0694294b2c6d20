"""When to grow: the trigger contract and the signals that a training loop hands to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from dynmoe.registry import Part, PartConfig


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a trigger may look at."""

    step: int
    """the loop's clock so far: optimizer steps in continual learning, environment steps in
    reinforcement learning"""
    task_starts: bool = False
    """a new task (not the first) begins at this very moment"""
    reached: tuple[float, ...] = ()
    """share of environments that were in each stage (a Craftax floor) since the last ask; the first
    is the stage where all begin; empty in loops without stages"""
    score: float | None = None
    """figure of merit of late, higher is better (mean episode return); nan while there is none yet,
    None in loops without one"""


class Trigger(Part, ABC, kind="trigger"):
    """Base of all triggers. A loop asks `fires` at each task start and before each update."""

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def fires(self, signals: Signals) -> bool:
        """Whether to grow now."""

    @abstractmethod
    def planned(self, steps: int, tasks: int) -> int:
        """Most growths in a run of that many optimizer steps and tasks; sets the layers' size."""

    def state_dict(self) -> dict[str, Any]:
        """State to resume from; none by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        assert not state, state


class ClockTrigger(Trigger, ABC):
    """Base of the triggers that go by the loop's clock, however far it moves between two asks."""

    def __init__(self, config: PartConfig) -> None:
        super().__init__(config)
        self.asked_at = 0

    @abstractmethod
    def due(self, before: int, now: int) -> bool:
        """Whether a growth falls after step `before` and no later than step `now`."""

    def fires(self, signals: Signals) -> bool:
        """Whether a growth has fallen due since the last ask; task starts do not count as asks."""
        if signals.task_starts:
            return False
        before, self.asked_at = self.asked_at, signals.step
        return self.due(before, signals.step)

    def state_dict(self) -> dict[str, Any]:
        """The clock at the last ask."""
        return {"asked_at": self.asked_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.asked_at = state["asked_at"]

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
    """optimizer steps taken so far"""
    task_starts: bool = False
    """a new task (not the first) begins at this very moment"""


class Trigger(Part, ABC, kind="trigger"):
    """Base of all triggers. A loop asks `fires` at each task start and before each step."""

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def fires(self, signals: Signals) -> bool:
        """Whether to grow now."""

    @abstractmethod
    def planned(self, steps: int, tasks: int) -> int:
        """Most growths in a run of that many optimizer steps and tasks; sets the layers' size."""

    def state_dict(self) -> dict[str, Any]:
        """State to resume from. The triggers that only count have none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        assert not state, state

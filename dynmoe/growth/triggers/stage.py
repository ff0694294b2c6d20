"""Grow when a new stage of the environment is reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynmoe.errors import UserError
from dynmoe.growth.trigger import Signals, Trigger
from dynmoe.registry import PartConfig


class StageTrigger(Trigger, name="stage"):
    """At the first arrival in a stage deeper than all before, such as a Craftax floor."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the stage trigger."""

        share: float = 0.0
        """a stage counts once more than this share of the environments is in it between two asks;
        0 for the first environment that gets there"""
        limit: int = 1
        """most growths"""

    def __init__(self, config: Config) -> None:
        if not 0 <= config.share < 1 or config.limit < 1:
            raise UserError(
                f"trigger stage: share={config.share} must be in [0, 1) and limit={config.limit} "
                "at least 1"
            )
        super().__init__(config)
        self.share, self.limit = config.share, config.limit
        self.deepest, self.growths = 0, 0

    def fires(self, signals: Signals) -> bool:
        """Whether a new deepest stage has been reached; several at once are one growth.

        Raises:
            UserError: the loop has no stages.
        """
        if len(signals.reached) < 2:
            raise UserError(
                "trigger stage: there are no stages here to arrive in; use another --trigger"
            )
        there = [stage for stage, share in enumerate(signals.reached) if share > self.share]
        if max(there, default=0) <= self.deepest or self.growths == self.limit:
            return False
        self.deepest = max(there)
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit allows."""
        return self.limit

    def state_dict(self) -> dict[str, Any]:
        """The deepest stage so far and the growths made."""
        return {"deepest": self.deepest, "growths": self.growths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.deepest, self.growths = state["deepest"], state["growths"]

"""Grow when progress stalls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.trigger import Signals, Trigger
from dynmoe.registry import PartConfig


class PlateauTrigger(
    Trigger, name="plateau", source="ours; answers an open question of Kim 2025 (arXiv 2511.18987)"
):
    """When the score has not risen for a while (an answer to an open question of 2511.18987)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the plateau trigger."""

        patience: int = 100_000
        """steps of the clock without a gain after which to grow"""
        gain: float = 0.05
        """a gain is a score above the best so far by this share of it"""
        limit: int = 1
        """most growths"""

    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    def __init__(self, config: Config) -> None:
        if config.patience < 1 or not config.gain >= 0 or config.limit < 1:
            raise UserError(
                f"trigger plateau: patience={config.patience} and limit={config.limit} must be at "
                f"least 1, gain={config.gain} at least 0"
            )
        super().__init__(config)
        self.patience, self.gain, self.limit = config.patience, config.gain, config.limit
        self.best, self.since, self.growths = -math.inf, 0, 0

    def fires(self, signals: Signals) -> bool:
        """Whether the last gain, or growth, lies `patience` steps back or more.

        Raises:
            UserError: the loop gives no score.
        """
        if signals.score is None:
            raise UserError(
                "trigger plateau: there is no score here to watch; use another --trigger"
            )
        if math.isnan(signals.score):
            self.since = signals.step
            return False
        if self.best == -math.inf or signals.score > self.best + self.gain * abs(self.best):
            self.best, self.since = signals.score, signals.step
        if signals.step - self.since < self.patience or self.growths == self.limit:
            return False
        self.since = signals.step
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit and the clock allow."""
        return min(self.limit, max(0, steps - 1) // self.patience)

    def state_dict(self) -> dict[str, Any]:
        """The best score, the step of the last gain or growth, and the growths made."""
        return {"best": self.best, "since": self.since, "growths": self.growths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.best, self.since, self.growths = state["best"], state["since"], state["growths"]

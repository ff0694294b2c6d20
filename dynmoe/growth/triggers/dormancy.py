"""Grow when units fall asleep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.trigger import FigureTrigger


class DormancyTrigger(FigureTrigger, name="dormancy"):
    """When the share of dormant units has risen so far above its lowest since the last growth.

    Dormant units: Sokar et al. 2023 (arXiv 2302.12902), Eq. 1; as a call for growth they are ours.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the dormancy trigger."""

        rise: float = 0.1
        """of the share of dormant units (0 .. 1), upon which to grow"""
        every: int = 50
        """optimizer steps between two measurements; in rl, --probe-every decides"""

    figure: ClassVar[str] = "dormant"

    def __init__(self, config: Config) -> None:
        if not 0 < config.rise < 1 or config.every < 1:
            raise UserError(
                f"trigger dormancy: rise={config.rise} must be between 0 and 1 and "
                f"every={config.every} at least 1"
            )
        super().__init__(config)
        self.rise, self.every = config.rise, config.every

    def nothing(self) -> dict[str, Any]:
        """All units count as dormant until the first look."""
        return {"lowest": 1.0}

    def calls(self, value: float) -> bool:
        """Whether the share has risen far enough."""
        self.memory["lowest"] = min(self.memory["lowest"], value)
        return value >= self.memory["lowest"] + self.rise

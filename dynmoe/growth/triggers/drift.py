"""Grow when the loss rises: the Page-Hinkley test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.trigger import FigureTrigger


class DriftTrigger(
    FigureTrigger,
    name="drift",
    source="Page 1954 (Biometrika 41); Gama et al. 2014 (ACM Computing Surveys 46)",
):
    """When the Page-Hinkley test finds that the training loss has risen.

    m_T sums x_t - mean_t - delta over all values x_t; a rise is found where m_T exceeds its lowest
    value so far by more than `threshold`. mean_t is the mean of the values up to x_t. Ours: the
    first `warmup` values enter the mean only, and the mean may look back a number of values only,
    since a loss that falls during training would leave the mean of all values far above it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the Page-Hinkley test."""

        threshold: float = 5.0
        """largest sum of rises that is no drift, in units of the loss (lambda)"""
        delta: float = 0.05
        """rise of a single value that is tolerated"""
        warmup: int = 30
        """values that enter the mean only, at the start and after each growth"""
        memory: int = 50
        """values that the mean looks back; 0 for all (the test as published)"""

    figure: ClassVar[str] = "loss"

    def __init__(self, config: Config) -> None:
        if not config.threshold > 0 or not config.delta >= 0:
            raise UserError(
                f"trigger drift: threshold={config.threshold} must be above 0 and "
                f"delta={config.delta} at least 0"
            )
        if config.warmup < 1 or config.memory < 0:
            raise UserError(
                f"trigger drift: warmup={config.warmup} must be at least 1 and "
                f"memory={config.memory} at least 0"
            )
        super().__init__(config)
        self.threshold, self.delta = config.threshold, config.delta
        self.warmup, self.look_back = config.warmup, config.memory

    def nothing(self) -> dict[str, Any]:
        """No values, no sums."""
        return {"count": 0, "mean": 0.0, "sum": 0.0, "lowest": 0.0}

    def calls(self, value: float) -> bool:
        """Whether the sum stands high above its lowest."""
        memory = self.memory
        memory["count"] += 1
        weight = min(memory["count"], self.look_back or memory["count"])
        memory["mean"] += (value - memory["mean"]) / weight
        if memory["count"] <= self.warmup:
            return False
        memory["sum"] += value - memory["mean"] - self.delta
        memory["lowest"] = min(memory["lowest"], memory["sum"])
        return memory["sum"] - memory["lowest"] > self.threshold

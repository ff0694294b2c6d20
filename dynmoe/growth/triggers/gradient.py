"""Grow when gradients fade."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.trigger import FigureTrigger


class GradientTrigger(FigureTrigger, name="gradient"):
    """When the mean gradient norm of late falls below a share of its highest since the last growth.

    The mean is exponential and corrected for its start; its highest counts once `memory` steps are
    in it, since the first gradients of a network are far off.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the gradient trigger."""

        share: float = 0.2
        """of the highest mean, below which to grow"""
        memory: int = 50
        """training steps that the mean looks back (updates in rl)"""

    figure: ClassVar[str] = "grad_norm"

    def __init__(self, config: Config) -> None:
        if not 0 < config.share < 1 or config.memory < 1:
            raise UserError(
                f"trigger gradient: share={config.share} must be between 0 and 1 and "
                f"memory={config.memory} at least 1"
            )
        super().__init__(config)
        self.share, self.decay, self.least = config.share, 1 - 1 / config.memory, config.memory

    def nothing(self) -> dict[str, Any]:
        """No steps, no mean, no highest mean."""
        return {"steps": 0, "mean": 0.0, "highest": 0.0}

    def calls(self, value: float) -> bool:
        """Whether the mean has fallen far enough."""
        memory = self.memory
        memory["steps"] += 1
        memory["mean"] = self.decay * memory["mean"] + (1 - self.decay) * value
        mean = memory["mean"] / (1 - self.decay ** memory["steps"])
        if memory["steps"] < self.least:
            return False
        memory["highest"] = max(memory["highest"], mean)
        return mean < self.share * memory["highest"]

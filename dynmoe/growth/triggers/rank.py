"""Grow when the representation collapses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.trigger import FigureTrigger


class RankTrigger(FigureTrigger, name="rank"):
    """When the effective rank of the features falls below a share of its highest since a growth.

    Collapse of rank goes with lost plasticity in some networks and not in others (Lyle et al. 2022,
    arXiv 2204.09560); as a call for growth it is ours.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the rank trigger."""

        share: float = 0.7
        """of the highest effective rank, below which to grow"""
        every: int = 50
        """optimizer steps between two measurements; in rl, --probe-every decides"""

    figure: ClassVar[str] = "effective_rank"

    def __init__(self, config: Config) -> None:
        if not 0 < config.share < 1 or config.every < 1:
            raise UserError(
                f"trigger rank: share={config.share} must be between 0 and 1 and "
                f"every={config.every} at least 1"
            )
        super().__init__(config)
        self.share, self.every = config.share, config.every

    def nothing(self) -> dict[str, Any]:
        """No highest rank."""
        return {"highest": 0.0}

    def calls(self, value: float) -> bool:
        """Whether the rank has fallen far enough."""
        self.memory["highest"] = max(self.memory["highest"], value)
        return value < self.share * self.memory["highest"]

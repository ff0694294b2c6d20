"""Growth when a figure asks for it: a plateau, smaller gradients, lower rank, dormant units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.trigger import FigureTrigger, Signals, Trigger
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

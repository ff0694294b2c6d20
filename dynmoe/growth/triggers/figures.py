"""Growth when a figure asks for it: a plateau, gradients, rank, dormant units.

Tests of change, which watch the loss, are in `changes.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
from dynmoe.growth.triggers.clock import Signals, Trigger
from dynmoe.registry import PartConfig

STEP_FIGURES = frozenset({"loss", "grad_norm"})
"""Figures of single steps; the others are measured on a probe batch."""


class RowTrigger(Trigger, ABC):
    """Base of the triggers that act alike on each row of a stream, whatever the batch size.

    One batch of few rows says little. So steps on fewer than `rows` rows are joined: as many of
    them as have `rows` rows together count as one step, in all counts of a trigger, and their mean
    loss or gradient norm is one value. Steps on more rows count as they are.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every trigger that watches a figure."""

        rows: int = 64
        """training rows (images) in a step; smaller batches are joined until they have as many (cl;
        other loops do not join)"""

    def __init__(self, config: Config) -> None:
        if config.rows < 1:
            raise UserError(f"trigger {self.name}: rows={config.rows} must be at least 1")
        super().__init__(config)
        self.rows = config.rows

    def count_rows(self, batch: int) -> None:
        """The loop's steps are on `batch` rows each."""
        self.joined = -(-self.rows // batch)


class FigureTrigger(RowTrigger, ABC):
    """Base of the triggers that watch one figure, and wait a while after each growth.

    The figure is looked at from the start, and all that was learnt of it is forgotten at a growth.
    What is seen during the wait counts: a call that lasts is answered when the wait is over. Where
    the clock begins anew, as in a second training with the same trigger, so does the wait.

    Attributes:
        figure: which one, as `Signals` names it.
        memory: what was learnt of it since the last growth; plain values.
        part: sum and number of values that wait to be joined.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RowTrigger.Config):
        """Options of every trigger that watches one figure."""

        cooldown: int = 500
        """steps before the first growth, and between two (optimizer steps in cl, env steps in
        rl)"""
        limit: int = 9
        """most growths"""

    figure: ClassVar[str]
    state = ("since", "growths", "memory", "part")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.needs = frozenset({cls.figure})

    def __init__(self, config: Config) -> None:
        if config.cooldown < 1 or config.limit < 1:
            raise UserError(
                f"trigger {self.name}: cooldown={config.cooldown} and limit={config.limit} must "
                "be at least 1"
            )
        super().__init__(config)
        self.cooldown, self.limit = config.cooldown, config.limit
        self.since, self.growths = 0, 0
        self.memory, self.part = self.nothing(), [0.0, 0]

    @abstractmethod
    def nothing(self) -> dict[str, Any]:
        """The memory before any value."""

    @abstractmethod
    def calls(self, value: float) -> bool:
        """Take a new value into the memory; whether it calls for a growth."""

    def fires(self, signals: Signals) -> bool:
        """Whether the figure calls for a growth and the wait is over; task starts bring no values.

        Raises:
            UserError: the loop does not have the figure.
        """
        value = getattr(signals, self.figure)
        if value is None:
            raise UserError(
                f"trigger {self.name}: there is no {self.figure} here to watch; use another "
                "--trigger"
            )
        self.since = min(self.since, signals.step)  # a new loop's clock is behind the old one's
        if signals.task_starts or not math.isfinite(value) or self.growths == self.limit:
            return False
        if self.joined > 1 and self.figure in STEP_FIGURES:
            total, count = self.part[0] + value, self.part[1] + 1
            self.part = [total, count]
            if count < self.joined:
                return False
            value, self.part = total / count, [0.0, 0]
        if not self.calls(value) or signals.step - self.since < self.cooldown * self.joined:
            return False
        self.since, self.memory = signals.step, self.nothing()
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit and the clock allow."""
        return min(self.limit, max(0, steps - 1) // (self.cooldown * self.joined))


def check_share(config: PartConfig, share: str, count: str) -> None:
    """Refuse an option that is no share, or another that is no count; both by name.

    Raises:
        UserError: one of them is; names both.
    """
    value, number = getattr(config, share), getattr(config, count)
    if not 0 < value < 1 or number < 1:
        raise UserError(
            f"trigger {config.part.name}: {share}={value} must be between 0 and 1 and "
            f"{count}={number} at least 1"
        )


class PlateauTrigger(
    RowTrigger,
    name="plateau",
    source="ours; answers an open question of Kim 2025 (arXiv 2511.18987)",
):
    """When the score has not risen for a while (an answer to an open question of 2511.18987).

    It finds no change: where nothing changes it grows every `patience` steps, up to its limit.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RowTrigger.Config):
        """Options of the plateau trigger."""

        patience: int = 100_000
        """steps without a gain after which to grow (env steps in rl); in cl hundreds"""
        gain: float = 0.05
        """a gain is a score above the best so far by this share of it"""
        limit: int = 1
        """most growths"""

    needs: ClassVar[frozenset[str]] = frozenset({"score"})
    state = ("best", "since", "growths")

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
        self.since = min(self.since, signals.step)
        if not math.isfinite(signals.score):
            self.since = signals.step
            return False
        if self.best == -math.inf or signals.score > self.best + self.gain * abs(self.best):
            self.best, self.since = signals.score, signals.step
        waited = signals.step - self.since
        if waited < self.patience * self.joined or self.growths == self.limit:
            return False
        self.since = signals.step
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit and the clock allow."""
        return min(self.limit, max(0, steps - 1) // (self.patience * self.joined))


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
        check_share(config, "share", "memory")
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
        check_share(config, "share", "every")
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
        check_share(config, "rise", "every")
        super().__init__(config)
        self.rise, self.every = config.rise, config.every

    def nothing(self) -> dict[str, Any]:
        """All units count as dormant until the first look."""
        return {"lowest": 1.0}

    def calls(self, value: float) -> bool:
        """Whether the share has risen far enough."""
        self.memory["lowest"] = min(self.memory["lowest"], value)
        return value >= self.memory["lowest"] + self.rise

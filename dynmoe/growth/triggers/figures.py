"""Growth when a figure asks for it: a plateau, gradients, rank, dormant units, a drift."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dynmoe.errors import UserError
from dynmoe.growth.triggers.clock import Signals, Trigger
from dynmoe.registry import PartConfig


class FigureTrigger(Trigger, ABC):
    """Base of the triggers that watch one figure, and wait a while after each growth.

    The figure is looked at from the start, and all that was learnt of it is forgotten at a growth.
    What is seen during the wait counts: a call that lasts is answered when the wait is over.

    Attributes:
        figure: which one, as `Signals` names it.
        memory: what was learnt of it since the last growth; plain values.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every trigger that watches a figure."""

        cooldown: int = 500
        """steps of the clock before the first growth, and between two (optimizer steps in cl, env
        steps in rl)"""
        limit: int = 9
        """most growths"""

    figure: ClassVar[str]
    state = ("since", "growths", "memory")

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
        self.memory = self.nothing()

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
        if signals.task_starts or math.isnan(value) or self.growths == self.limit:
            return False
        if not self.calls(value) or signals.step - self.since < self.cooldown:
            return False
        self.since, self.memory = signals.step, self.nothing()
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit and the clock allow."""
        return min(self.limit, max(0, steps - 1) // self.cooldown)


def check_share(config: PartConfig, share: str, count: str) -> None:
    """Refuse an option that is no share, or another that is no count; both by name."""
    value, number = getattr(config, share), getattr(config, count)
    if not 0 < value < 1 or number < 1:
        raise UserError(
            f"trigger {config.part.name}: {share}={value} must be between 0 and 1 and "
            f"{count}={number} at least 1"
        )


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


class AdwinTrigger(FigureTrigger, name="adwin", source="Bifet & Gavalda 2007 (SDM), Section 3"):
    """When the recent part of a window over the training loss has a higher mean than the rest.

    ADWIN keeps a window of values and drops its older part W0 wherever a split into W0 and W1 has
    |mean(W0) - mean(W1)| >= sqrt(2/m var(W) ln(2/d)) + 2/(3m) ln(2/d), with the harmonic mean
    1/m = 1/|W0| + 1/|W1| and d = confidence / ln |W|. The bound is for values in 0 .. 1: the loss
    is divided by `scale` and cut there. All splits are tried (the paper's plain form, not its
    exponential histogram), over at most `window` values. Ours: only a drop that leaves a higher
    mean calls for a growth.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the adaptive window."""

        confidence: float = 0.002
        """chance of a false alarm (delta); smaller is more careful"""
        scale: float = 5.0
        """loss that stands for 1; larger ones are cut to it"""
        window: int = 1000
        """most values kept"""

    figure: ClassVar[str] = "loss"

    def __init__(self, config: Config) -> None:
        if not 0 < config.confidence < 1 or not config.scale > 0 or config.window < 10:
            raise UserError(
                f"trigger adwin: confidence={config.confidence} must be between 0 and 1, "
                f"scale={config.scale} above 0 and window={config.window} at least 10"
            )
        super().__init__(config)
        self.confidence, self.scale, self.window = config.confidence, config.scale, config.window

    def nothing(self) -> dict[str, Any]:
        """An empty window, and no call that waits."""
        return {"window": [], "risen": False}

    def calls(self, value: float) -> bool:
        """Whether the window has lost an older part of a lower mean since the last growth."""
        window = [*self.memory["window"], min(max(value / self.scale, 0.0), 1.0)][-self.window :]
        while (split := self._split(window)) is not None:
            self.memory["risen"] = bool(np.mean(window[split:]) > np.mean(window[:split]))
            window = window[split:]
        self.memory["window"] = window
        return self.memory["risen"]

    def _split(self, window: list[float]) -> int | None:
        """|W0| of the first split into parts whose means differ by more than chance."""
        total = len(window)
        if total < 10:  # ln |W| and the variance mean little
            return None
        values = np.array(window)
        before = np.arange(1, total)
        sums = values.cumsum()[:-1]
        gap = np.abs(sums / before - (values.sum() - sums) / (total - before))
        inverse = 1 / before + 1 / (total - before)
        log = math.log(2 * math.log(total) / self.confidence)
        bound = np.sqrt(2 * inverse * values.var() * log) + 2 / 3 * inverse * log
        hits = np.flatnonzero(gap >= bound)
        return int(before[hits[0]]) if len(hits) else None

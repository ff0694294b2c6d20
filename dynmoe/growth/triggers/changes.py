"""Growth when a test finds that the loss has risen: Page-Hinkley, and an adaptive window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from dynmoe.errors import UserError
from dynmoe.growth.triggers.figures import FigureTrigger


def false_alarm_interval(threshold: float, delta: float) -> float:
    """Values between two false alarms of `drift` with unit `deviation`, on average.

    (exp(2 delta b) - 1 - 2 delta b) / (2 delta^2), b = threshold + 1.166: the mean time that a sum
    of independent normal values of mean -delta and deviation 1 takes to rise by `threshold` above
    its lowest. Source: Siegmund 1985 (Sequential Analysis, Springer), Section 10.2.

    Args:
        threshold: above 0.
        delta: above 0.
    """
    power = 2 * delta * (threshold + 1.166)
    return (math.exp(power) - 1 - power) / (2 * delta**2)


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

    With unit `deviation`, values enter as (x_t - mean) / deviation, both of the values before x_t,
    and threshold and delta are in deviations. Where nothing changes, false alarms are then about
    `false_alarm_interval(threshold, delta)` values apart, whatever the loss: see `docs/cl.md`.
    With unit `loss` no rate can be told, as it depends on the loss's spread.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the Page-Hinkley test."""

        unit: Literal["loss", "deviation"] = "loss"
        """of threshold and delta: the loss itself (as published), or its standard deviation of
        late; then try threshold 8 and delta 0.5"""
        threshold: float = 5.0
        """largest sum of rises that is no drift (lambda)"""
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
        self.unit, self.threshold, self.delta = config.unit, config.threshold, config.delta
        self.warmup, self.look_back = config.warmup, config.memory

    def nothing(self) -> dict[str, Any]:
        """No values, no sums."""
        return {"count": 0, "mean": 0.0, "variance": 0.0, "sum": 0.0, "lowest": 0.0}

    def calls(self, value: float) -> bool:
        """Whether the sum stands high above its lowest."""
        memory = self.memory
        memory["count"] += 1
        gap, deviation = value - memory["mean"], math.sqrt(memory["variance"])
        weight = min(memory["count"], self.look_back or memory["count"])
        memory["mean"] += gap / weight
        if self.unit == "deviation":
            spread = gap * (value - memory["mean"])
            memory["variance"] = max(
                0.0, memory["variance"] + (spread - memory["variance"]) / weight
            )
            rise = gap / deviation if deviation else 0.0
        else:
            rise = value - memory["mean"]
        if memory["count"] <= self.warmup:
            return False
        memory["sum"] += rise - self.delta
        memory["lowest"] = min(memory["lowest"], memory["sum"])
        return memory["sum"] - memory["lowest"] > self.threshold


class AdwinTrigger(FigureTrigger, name="adwin", source="Bifet & Gavalda 2007 (SDM), Section 3"):
    """When the recent part of a window over the training loss has a higher mean than the rest.

    ADWIN keeps a window of values and drops its older part W0 wherever a split into W0 and W1 has
    |mean(W0) - mean(W1)| >= sqrt(2/m var(W) ln(2/d)) + 2/(3m) ln(2/d), with the harmonic mean
    1/m = 1/|W0| + 1/|W1| and d = confidence / ln |W|. The bound is for values in 0 .. 1: the loss
    is divided by `scale` and cut there. All splits are tried (the paper's plain form, not its
    exponential histogram), over at most `window` values. At any one value, a window without a
    change is split with a chance of at most `confidence` (Theorem 3.1, of independent values); see
    `docs/cl.md`. Ours: only a drop that leaves a higher mean calls for a growth.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FigureTrigger.Config):
        """Options of the adaptive window."""

        confidence: float = 0.002
        """largest chance of a false alarm at a value (delta); smaller is more careful"""
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

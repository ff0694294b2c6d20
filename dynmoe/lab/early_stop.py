"""Stopping a run that does worse than earlier ones did at the same step, by what it logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dynmoe.errors import Pruned

Series = dict[int, float]
"""step -> what was logged there"""
FEWEST = 5
"""Earlier runs without which none is stopped."""


@dataclass(frozen=True)
class Bar:
    """What a run has to reach, step by step: the median of earlier runs.

    The median rule of Golovin et al. 2017 (Google Vizier, KDD), Section 3.2.2, and of Optuna's
    `MedianPruner`; of each step alone, as the numbers of one task say little of the next one's.
    """

    tag: str
    """of the logged number"""
    medians: Series
    """at each step at which all earlier runs logged it"""
    minimize: bool = False
    """whether little of the number is wanted"""

    def check(self, step: int, values: dict[str, float]) -> None:
        """Compare what a run logs.

        Raises:
            Pruned: it is worse than the median.
        """
        if self.tag not in values or step not in self.medians:
            return
        value, wanted = values[self.tag], self.medians[step]
        if value > wanted if self.minimize else value < wanted:
            raise Pruned(f"stopped at step {step}: {self.tag} {value:.4g}, the median {wanted:.4g}")


def bar(tag: str, earlier: Sequence[Series], minimize: bool) -> Bar | None:
    """The bar that these runs set; None if they are fewer than `FEWEST`."""
    if len(earlier) < FEWEST:
        return None
    steps = set.intersection(*(set(own) for own in earlier))
    return Bar(tag, {s: median(own[s] for own in earlier) for s in sorted(steps)}, minimize)


def logged_series(folder: Path, tag: str) -> Series:
    """What a finished run has logged under a tag."""
    found = {}
    with open(folder / "log.jsonl", "rb") as file:
        for line in file:
            values = json.loads(line)
            if values.get(tag) is not None and "event" not in values:
                found[int(values["step"])] = float(values[tag])
    return found

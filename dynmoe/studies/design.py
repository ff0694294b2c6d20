"""What a study is: variants on streams, and a verdict computed from their numbers.

Shapes: S seeds, T tasks. Accuracies are shares in 0..1, differences are given in points (of 100).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dynmoe.lab.statistics import (
    Interval,
    confidence_interval,
    paired_difference,
    probability_of_improvement,
    seeds_to_see,
)
from dynmoe.registry import Part
from dynmoe.studies.views.domains import Domains
from dynmoe.studies.views.returns import Returns
from dynmoe.studies.views.shifts import Shifts
from dynmoe.studies.views.tasks import Tasks
from dynmoe.studies.views.view import At, View

Preset = Literal["laptop", "paper"]
Command = Literal["cl", "rl", "tta", "dg"]
VIEWS: dict[Command, View] = {"cl": Tasks(), "rl": Returns(), "tta": Shifts(), "dg": Domains()}
"""Command -> how its runs are made, read and drawn."""


class Study(Part, ABC, kind="study"):
    """Base of all studies. The first line of a study's docstring is its question.

    Attributes:
        command: whose runs are compared.
        seeds: for each preset.
        tags: (title, tag) of scalars in the runs' logs that are kept beside the accuracies.
    """

    command: ClassVar[Command] = "cl"
    seeds: ClassVar[dict[Preset, int]] = {"laptop": 3, "paper": 5}
    tags: ClassVar[tuple[tuple[str, str], ...]] = ()

    @abstractmethod
    def streams(self, preset: Preset) -> dict[str, str]:
        """Stream -> flags of all runs on it."""

    @abstractmethod
    def variants(self, preset: Preset) -> dict[str, str]:
        """Variant -> its own flags."""

    @abstractmethod
    def verdict(self, results: Results) -> list[str]:
        """Sentences that follow from the numbers, each with its interval."""

    def flags_on(self, stream: str, flags: str) -> str:
        """A variant's flags on one stream; as they are unless defined."""
        return flags

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Variant -> flags to choose among before the seeds are run; none unless defined."""
        return {}


@dataclass(frozen=True)
class Results:
    """All finished runs of a study. Where metric or tasks are not named, they are the view's."""

    runs: dict[str, dict[str, list[dict[str, Any]]]]
    """stream -> variant -> summaries, one per seed"""
    folders: dict[str, dict[str, list[Path]]]
    """stream -> variant -> run folders, one per seed"""
    view: View = VIEWS["cl"]

    @property
    def streams(self) -> list[str]:
        """Names, in order."""
        return list(self.runs)

    def tasks(self, stream: str, variant: str, metric: str) -> list[list[float]]:
        """[S][T] of a field of the summaries' task rows, such as `train_accuracy`."""
        return [[task[metric] for task in run["tasks"]] for run in self.runs[stream][variant]]

    def values(
        self, stream: str, variant: str, metric: str = "", at: At | None = None
    ) -> list[float]:
        """[S] one number per seed."""
        runs = self.runs[stream][variant]
        metric, at = metric or self.view.metric, at or self.view.at
        return [self.view.value(run, metric, at) for run in runs]

    def scalars(self, stream: str, variant: str, tag: str) -> list[list[float]]:
        """[S][points] of a tag in the runs' logs, in order of time."""
        return [logged(folder, tag) for folder in self.folders[stream][variant]]

    def difference(
        self,
        stream: str,
        a: str,
        b: str,
        metric: str = "",
        at: At | None = None,
    ) -> Interval:
        """Mean of a - b over seeds, paired by seed, with its 95 % t interval."""
        return paired_difference(
            self.values(stream, a, metric, at), self.values(stream, b, metric, at)
        )

    def says(
        self,
        stream: str,
        a: str,
        b: str,
        metric: str = "",
        at: At | None = None,
    ) -> str:
        """One sentence: is a above b on this stream? The interval decides."""
        gap = self.difference(stream, a, b, metric, at)
        ones, others = (self.values(stream, v, metric, at) for v in (a, b))
        chance, needed = probability_of_improvement(ones, others), seeds_to_see(ones, others)
        metric, at = metric or self.view.metric, at or self.view.at
        factor, unit, digits = self.view.unit(metric)
        low, high = factor * gap.low, factor * gap.high
        word = gap.verdict("higher", "lower", "no difference seen")
        more = f"; {needed} seeds to see it" if low <= 0 <= high and needed else ""
        return (
            f"{stream}: {a} against {b}: {factor * gap.point:+.{digits}f}{unit} "
            f"[{low:.{digits}f}, {high:.{digits}f}], {word} ({self.view.describe(metric, at)}; "
            f"better with probability {chance.point:.2f}{more})."
        )

    def kept(self, stream: str, variant: str, metric: str = "") -> str:
        """One sentence: does a variant hold its first level to the end of the stream?"""
        metric = metric or self.view.metric
        first, last = (self.values(stream, variant, metric, at) for at in ("first", "last"))
        gap = paired_difference(last, first)
        factor, unit, digits = self.view.unit(metric)
        point, low, high = (factor * x for x in gap)
        word = gap.verdict("gains", "loses", "no change seen")
        return (
            f"{stream}: {variant} from {self.view.span}: {point:+.{digits}f}{unit} "
            f"[{low:.{digits}f}, {high:.{digits}f}], {word} ({metric.replace('_', ' ')})."
        )

    def interval(
        self, stream: str, variant: str, metric: str = "", at: At | None = None
    ) -> Interval:
        """Mean over seeds with its 95 % t interval; nan where a run lacks the metric."""
        values = self.values(stream, variant, metric, at)
        if any(map(math.isnan, values)):
            return Interval(math.nan, math.nan, math.nan)
        return confidence_interval(values, "mean")


def logged(folder: Path, tag: str) -> list[float]:
    """All values of one tag in a run's log, in order; missing numbers are left out."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        value = json.loads(line).get(tag)
        if isinstance(value, int | float):
            found.append(float(value))
    return found

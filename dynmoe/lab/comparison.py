"""Runs side by side: their numbers, differences with intervals, and sentences about both.

Shapes: S seeds, T tasks. Shares are in 0..1, and their differences are told in points (of 100).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynmoe.lab.config import digest, parse
from dynmoe.lab.experiment import At, Experiment
from dynmoe.lab.runner import Job, make_job
from dynmoe.lab.statistics import (
    Interval,
    confidence_interval,
    paired_difference,
    probability_of_improvement,
    seeds_to_see,
)


@dataclass(frozen=True)
class Results:
    """Finished runs. Where metric or part are not named, they are the experiment's."""

    runs: dict[str, dict[str, list[dict[str, Any]]]]
    """stream -> variant -> summaries, one per seed"""
    folders: dict[str, dict[str, list[Path]]]
    """stream -> variant -> run folders, one per seed"""
    experiment: Experiment

    @classmethod
    def of(cls, jobs: dict[str, dict[str, list[Job]]], experiment: Experiment) -> Results:
        """Those of finished jobs."""
        return cls(
            {s: {v: [j.summary() for j in js] for v, js in vs.items()} for s, vs in jobs.items()},
            {s: {v: [j.folder for j in js] for v, js in vs.items()} for s, vs in jobs.items()},
            experiment,
        )

    @property
    def streams(self) -> list[str]:
        """Names, in order."""
        return list(self.runs)

    def values(
        self, stream: str, variant: str, metric: str = "", at: At | None = None
    ) -> list[float]:
        """[S] one number per seed."""
        runs = self.runs[stream][variant]
        metric, at = metric or self.experiment.metric, at or self.experiment.at
        return [self.experiment.value(run, metric, at) for run in runs]

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
        metric, at = metric or self.experiment.metric, at or self.experiment.at
        factor, unit, digits = self.experiment.unit(metric)
        low, high = factor * gap.low, factor * gap.high
        word = gap.verdict("higher", "lower", "no difference seen")
        more = f"; {needed} seeds to see it" if low <= 0 <= high and needed else ""
        about = self.experiment.describe(metric, at)
        return (
            f"{stream}: {a} against {b}: {factor * gap.point:+.{digits}f}{unit} "
            f"[{low:.{digits}f}, {high:.{digits}f}], {word} ({about}; "
            f"better with probability {chance.point:.2f}{more})."
        )

    def kept(self, stream: str, variant: str, metric: str = "") -> str:
        """One sentence: does a variant hold its first level to the end of the stream?"""
        metric = metric or self.experiment.metric
        first, last = (self.values(stream, variant, metric, at) for at in ("first", "last"))
        gap = paired_difference(last, first)
        factor, unit, digits = self.experiment.unit(metric)
        point, low, high = (factor * x for x in gap)
        word = gap.verdict("gains", "loses", "no change seen")
        return (
            f"{stream}: {variant} from {self.experiment.span}: {point:+.{digits}f}{unit} "
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


def plan(
    experiment: Experiment,
    presets: dict[str, Any],
    argv: list[str],
    seeds: list[int],
    runs_dir: Path,
    label: str,
) -> list[Job]:
    """One run of a command's flags per seed, in a folder named after their settings.

    Studies and sweeps thus share what they have in common.

    Raises:
        UserError: flags that do not fit.
    """
    # Flags for all variants may have no effect in some, such as the dense reference.
    argv = [*argv, "--allow-unused"]
    preset, config = parse(presets, argv, f"python -m dynmoe.{experiment.command}", "")
    experiment.check(config)
    config = experiment.settle(config)
    name = f"studies/{config.method.part.name}-{digest(config)}"
    own = {"name": name, "runs_dir": runs_dir, "resume": True, "compare": ()}
    found = [replace(config, seed=seed, **own) for seed in seeds]
    return [make_job(experiment, preset, one, label, None) for one in found]


def three(interval: Interval) -> list[float | None]:
    """(point, low, high) for JSON; ends that are not known become null."""
    return [None if x != x else round(float(x), 4) for x in interval]

"""Variants of a group beside each other: intervals, and differences to the first one.

All differences of a page are one `Family`, so that their intervals hold all at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynmoe.lab.experiment import Column, Experiment
from dynmoe.lab.finished import FinishedRun, Group, number
from dynmoe.lab.report import cell
from dynmoe.lab.statistics import (
    Family,
    Interval,
    confidence_interval,
    least_seen,
    probability_of_improvement,
    seeds_to_see,
)

UNKNOWN = Interval(math.nan, math.nan, math.nan)
HEADINGS = ("variant", "seeds", "mean", "IQM", "better than the first", "difference to the first",
            "verdict")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A variant's numbers on one stream; nan where a run lacks them."""

    variant: str
    seeds: list[int]
    """of its runs"""
    mean: Interval
    """of the experiment's metric, with its 95 % t interval"""
    iqm: Interval
    """interquartile mean of the same"""
    improvement: Interval
    """probability that a run of it is above one of the first variant's"""
    difference: Interval
    """to the first variant, paired by seed, at the family's level"""
    verdict: str
    """what follows from the difference"""
    columns: list[Interval]
    """means of the experiment's columns"""


def pairs(group: Group, stream: str) -> int:
    """Differences to the first variant that a stream has: those of two common seeds or more."""
    first, *others = group.runs[stream].values()
    return sum(len(first.keys() & own.keys()) > 1 for own in others)


def compare(group: Group, stream: str, family: Family) -> list[Row]:
    """A row for each variant, the first one's first."""
    experiment, variants = group.experiment, group.runs[stream]
    main = ("", experiment.metric, experiment.at)
    first = values(experiment, next(iter(variants.values())), main)
    rows = []
    for place, (variant, runs) in enumerate(variants.items()):
        own = values(experiment, runs, main)
        known = _known(own)
        gap, chance, word = _against(experiment, own, first, family) if place else _NOTHING
        rows.append(
            Row(
                variant, sorted(runs), _interval(own),
                confidence_interval(known, "iqm") if len(known) == len(own) else UNKNOWN,
                chance, gap, word,
                [_interval(values(experiment, runs, column)) for column in experiment.columns],
            )
        )  # fmt: skip
    return rows


def values(
    experiment: Experiment, runs: dict[int, FinishedRun], column: Column
) -> dict[int, float]:
    """Seed -> a metric, by seed; nan where a run has none."""
    _, metric, at = column
    return {seed: number(experiment, runs[seed], metric, at) for seed in sorted(runs)}


def comparison_table(experiment: Experiment, rows: list[Row]) -> list[list[str]]:
    """`HEADINGS`, then the texts of each row: the experiment's metric, compared."""
    factor, _, digits = experiment.unit(experiment.metric)
    table = [list(HEADINGS)]
    for place, row in enumerate(rows):
        mean, iqm = (cell(i, factor, digits, "not known") for i in (row.mean, row.iqm))
        cells = [row.variant, str(len(row.seeds)), mean, iqm]
        if place:
            cells += [
                cell(row.improvement, 1, 2),
                cell(row.difference, factor, digits),
                row.verdict,
            ]
        table.append(cells + [""] * (len(HEADINGS) - len(cells)))
    return table


def columns_table(experiment: Experiment, rows: list[Row]) -> list[list[str]]:
    """Headings, then the means of each row; without columns that no variant has."""
    units = [experiment.unit(metric) for _, metric, _ in experiment.columns]
    table = [["variant", *(heading for heading, _, _ in experiment.columns)]]
    for row in rows:
        cells = [
            cell(interval, factor, digits, experiment.lacking(metric))
            for (_, metric, _), interval, (factor, _, digits) in zip(
                experiment.columns, row.columns, units, strict=True
            )
        ]
        table.append([row.variant, *cells])
    known = [i for i, cells in enumerate(zip(*table[1:], strict=True)) if any(cells)]
    return [[cells[i] for i in known] for cells in table]


_NOTHING = (UNKNOWN, UNKNOWN, "")


def _against(
    experiment: Experiment, own: dict[int, float], first: dict[int, float], family: Family
) -> tuple[Interval, Interval, str]:
    """Difference to the first variant over common seeds, chance to be better, and the verdict."""
    shared = [s for s in own if s in first and not math.isnan(own[s] + first[s])]
    if not shared:
        return UNKNOWN, UNKNOWN, "no seed in common"
    a, b = [own[s] for s in shared], [first[s] for s in shared]
    gap, chance = family.difference(a, b), probability_of_improvement(_known(own), _known(first))
    word = gap.verdict("higher", "lower", "no difference seen")
    if gap.low <= 0 <= gap.high:
        word += _power_in_words(experiment, a, b, family.confidence)
    return gap, chance, word


def _power_in_words(
    experiment: Experiment, a: list[float], b: list[float], confidence: float
) -> str:
    """What so many seeds cannot tell, and how many would tell a difference such as this one."""
    least, needed = least_seen(a, b, confidence), seeds_to_see(a, b, confidence)
    factor, unit, digits = experiment.unit(experiment.metric)
    if least is None:
        return ""
    told = f"; cannot tell a difference below {factor * least:.{digits}f}{unit} at {len(a)} seeds"
    return told + (f", {needed} would tell this one" if needed else "")


def _interval(own: dict[int, float]) -> Interval:
    known = _known(own)
    return confidence_interval(known, "mean") if len(known) == len(own) else UNKNOWN


def _known(own: dict[int, float]) -> list[float]:
    return [value for value in own.values() if not math.isnan(value)]

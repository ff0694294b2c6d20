"""The tables of a page about finished runs: growths, cost, settings, environment; and CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

from dynmoe.lab.comparison import Row
from dynmoe.lab.events import Events
from dynmoe.lab.finished import FinishedRun, Group, differing, number, printable, show
from dynmoe.lab.statistics import Interval

MOST_GROWTHS = 12
"""Growths of a run that a table tells one by one."""

Table = list[list[str]]
"""headings, then rows"""


def growth_table(variants: dict[str, dict[int, FinishedRun]]) -> Table:
    """A row for each variant that has grown; [] if none has."""
    rows = []
    for variant, runs in variants.items():
        counts = [len(run.details.growths) for run in runs.values()]
        events = runs[min(runs)].details.growths
        if events:
            told = events[:MOST_GROWTHS]
            more = " ..." if len(events) > len(told) else ""
            steps, experts, sizes = (
                " ".join(f"{int(event[key]):,}" for event in told) + more
                for key in ("step", "experts", "parameters")
            )
            rows.append([variant, _mean(counts), steps, experts, sizes])
    head = ["variant", "growths per run", "at steps (first seed)", "experts after", "parameters"]
    return [head, *rows] if rows else []


def cost_table(variants: dict[str, dict[int, FinishedRun]], events: dict[Path, Events]) -> Table:
    """A row for each variant: runs, seconds, and what the command counts; means over runs."""
    own = {variant: list(runs.values()) for variant, runs in variants.items()}
    names = list(
        dict.fromkeys(n for runs in own.values() for run in runs for n in run.details.cost)
    )
    rows = [["variant", "runs", "seconds per run", *(name.replace("_", " ") for name in names)]]
    for variant, runs in own.items():
        seconds = [events[run.folder].seconds for run in runs]
        counts = [_mean([run.details.cost.get(n, math.nan) for run in runs]) for n in names]
        rows.append([variant, str(len(runs)), _mean(seconds, 1), *counts])
    return rows


def settings_tables(group: Group) -> tuple[Table, Table]:
    """Settings that differ between the variants of a group, and those that all of them share.

    The first has a row for each variant, or for each setting if these are more; [] if none differ.
    """
    settings = {
        _joined(stream, variant): next(iter(runs.values())).settings
        for stream, variants in group.runs.items()
        for variant, runs in variants.items()
    }
    every = list(settings.values())
    changed = differing(every)
    rows = [["variant", *map(printable, changed)]]
    rows += [[name, *(_value(one, key) for key in changed)] for name, one in settings.items()]
    if len(changed) >= len(settings):
        rows = [list(cells) for cells in zip(*rows, strict=True)]
        rows[0][0] = "setting"
    first = sorted(every[0].items())
    shared = [[printable(key), show(value)] for key, value in first if key not in changed]
    return rows if changed else [], [["setting", "value"], *shared]


def environment_table(groups: list[Group]) -> Table:
    """What the runs were made with, and in how many of their sessions, where they differ."""
    counts: dict[str, Counter[str]] = {}
    for run in all_runs(groups):
        for session in run.sessions:
            plain = {
                k: v for k, v in session.items() if k not in ("command", "started", "packages")
            }
            for key, value in (plain | session["packages"]).items():
                counts.setdefault(str(key), Counter())[show(value)] += 1
    rows = []
    for key, found in counts.items():
        ordered = sorted(found.items())
        several = len(ordered) > 1
        values = [f"{value} ({count} sessions)" if several else value for value, count in ordered]
        rows.append([printable(key), "; ".join(values)])
    return [["of", "found"], *rows]


def all_runs(groups: list[Group]) -> list[FinishedRun]:
    """Those of all streams, variants and seeds."""
    return [
        run
        for group in groups
        for variants in group.runs.values()
        for runs in variants.values()
        for run in runs.values()
    ]


def comparison_csv(rows: list[tuple[Group, str, list[Row]]]) -> str:
    """A line for each variant of each (group, stream): the numbers of its comparison, unrounded.

    Numbers are as the runs have them: accuracies are shares.
    """
    ends = ("", "_low", "_high")
    names = ("mean", "iqm", "better_than_first", "difference_to_first")
    head = ["group", "stream", "variant", "metric", "at", "seeds"]
    lines: list[list[Any]] = [[*head, *(f"{name}{end}" for name in names for end in ends)]]
    for group, stream, own in rows:
        experiment = group.experiment
        for row in own:
            found = [row.mean, row.iqm, row.improvement, row.difference]
            numbers = [x for interval in found for x in _known(interval)]
            about = [experiment.metric, experiment.at, len(row.seeds)]
            lines.append([group.title, stream, row.variant, *about, *numbers])
    return _csv(lines)


def runs_csv(groups: list[Group], events: dict[Path, Events]) -> str:
    """A line for each number of each run."""
    lines: list[list[Any]] = [["group", "stream", "variant", "seed", "folder", "name", "value"]]
    for group in groups:
        experiment = group.experiment
        for stream, variants in group.runs.items():
            for variant, runs in variants.items():
                for seed in sorted(runs):
                    run = runs[seed]
                    found: dict[str, float] = {
                        f"{metric}, {at}": number(experiment, run, metric, at)
                        for _, metric, at in experiment.columns
                    }
                    found |= run.details.cost | {"seconds": round(events[run.folder].seconds, 1)}
                    begin = [group.title, stream, variant, seed, printable(run.folder)]
                    lines += [[*begin, n, v] for n, v in found.items() if v == v]
    return _csv(lines)


def _csv(lines: list[list[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _known(interval: Interval) -> list[float | str]:
    return ["" if math.isnan(x) else float(x) for x in interval]


def _mean(values: list[float] | list[int], digits: int = 0) -> str:
    """The mean in as many digits as it needs, at most one; "" where a run has no number."""
    mean = sum(values) / len(values)
    if math.isnan(mean):
        return ""
    return f"{mean:,.{1 if mean != round(mean) and digits == 0 else digits}f}"


def _value(settings: dict[str, Any], key: str) -> str:
    return show(settings[key]) if key in settings else ""


def _joined(stream: str, variant: str) -> str:
    return f"{stream}: {variant}" if stream else variant

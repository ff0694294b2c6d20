"""What the runs of a comparison add up to: a table, results.json and figures.

DomainBed's table: accuracy on each left-out domain as the mean over trials with its standard error,
and their average. Beside it stand a 95 % t interval of the average and of the difference to
the first method, paired by trial, and the trainable parameters.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.experiments.dg.settings import Config
from dynmoe.lab.files import make_folder, write_json
from dynmoe.lab.statistics import Interval, confidence_interval, paired_difference

Summaries = dict[str, list[dict[str, Any]]]
"""method -> one summary per trial"""


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over trials, as DomainBed prints them; nan for a single trial.

    The deviation is numpy's default, divided by n and not n - 1, as in DomainBed's tables.
    """
    error = float(np.std(values) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def by_domain(summaries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Left-out domain -> accuracy (a share) in each trial."""
    names = [row["domain"] for row in summaries[0]["tests"]]
    return {n: [s["tests"][i]["accuracy"] for s in summaries] for i, n in enumerate(names)}


def collect(summaries: Summaries) -> dict[str, dict[str, Any]]:
    """Per method: `domains` name -> (mean, error), `average` (mean, error), `interval`,
    `difference` to the first method (None for itself), `parameters`, `trainable`, `values`,
    `measures` (means of the method's own figures over trials and domains).
    """  # noqa: D205
    first = next(iter(summaries))
    base = _means(by_domain(summaries[first]))
    found = {}
    for name, own in summaries.items():
        values = by_domain(own)
        means = _means(values)
        last = own[0]["tests"][-1]
        found[name] = {
            "domains": {domain: mean_error(trials) for domain, trials in values.items()},
            "average": mean_error(means),
            "interval": confidence_interval(means, "mean"),
            "difference": None if name == first else paired_difference(means, base),
            "parameters": last["parameters"],
            "trainable": last["trainable"],
            "values": values,
            "measures": _measures(own),
        }
    return found


def _means(values: dict[str, list[float]]) -> list[float]:
    """Each trial's mean over the domains: the trials, not their domains, are independent."""
    return [float(np.mean(trial)) for trial in zip(*values.values(), strict=True)]


def _measures(summaries: list[dict[str, Any]]) -> dict[str, float]:
    """Means over trials and left-out domains of the method's own figures."""
    rows = [row["measures"] for summary in summaries for row in summary["tests"]]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def report(
    folder: Path, config: Config, summaries: Summaries, folders: dict[str, list[Path]]
) -> None:
    """Write `folder/results.json`, draw the figures there and print the table."""
    from dynmoe.experiments.dg import figures

    found = collect(summaries)
    some = next(iter(summaries.values()))[0]
    trials = len(next(iter(summaries.values())))
    title = f"{some['dataset']}, {some['model']}, {config.selection} selection"
    make_folder(folder)
    write_json(folder / "results.json", {
        "dataset": some["dataset"], "model": some["model"], "selection": config.selection,
        "trials": trials, "methods": found,
    })  # fmt: skip
    figures.parameters_figure(folder / "accuracy_parameters.png", found, title)
    for name, paths in folders.items():
        file = paths[0] / "figures.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as loaded:
                arrays = {key: loaded[key] for key in loaded.files}
            one = summaries[name][0]
            left_out = one["tests"][0]["domain"]
            figures.method_figures(folder, name, arrays, one["domains"], left_out)
    print_table(found, title, trials)
    for name, row in found.items():
        if row["measures"]:
            own = (f"{key} {value:.4f}" for key, value in row["measures"].items())
            print(f"{name}: {', '.join(own)}")
    print(f"results: {folder}")


def print_table(found: dict[str, dict[str, Any]], title: str, trials: int) -> None:
    """One row per method."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(found))
    caption = (
        f"test accuracy in % (mean ± standard error, {trials} trial(s)); brackets: 95 % t "
        f"intervals over trials; minus {first}: paired by trial"
    )
    table = Table(title=title, caption=caption)
    table.add_column("method")
    for domain in found[first]["domains"]:
        table.add_column(domain, justify="right")
    for heading in ("average", "interval", f"minus {first}", "trainable", "parameters"):
        table.add_column(heading, justify="right")
    for name, row in found.items():
        gap = row["difference"]
        table.add_row(
            name,
            *(_cell(pair) for pair in row["domains"].values()),
            _cell(row["average"]),
            _ends(row["interval"]),
            "" if gap is None else f"{100 * gap.point:+.1f} {_ends(gap)}".rstrip(),
            f"{row['trainable']:,}",
            f"{row['parameters']:,}",
        )
    Console(width=max(160, Console().width)).print(table)


def _cell(pair: tuple[float, float]) -> str:
    mean, error = (100 * x for x in pair)
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _ends(interval: Interval) -> str:
    if math.isnan(interval.low):
        return ""
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"

"""A command line: all its runs, and what they leave: results.json, a figure, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dynmoe.lab import processes, torchrun
from dynmoe.lab.config import identity
from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.files import make_folder, write_json
from dynmoe.lab.launchers import Local
from dynmoe.lab.names import of_others
from dynmoe.lab.results import Result, read_run
from dynmoe.lab.runner import make_job, results_of, run_jobs, run_one
from dynmoe.lab.statistics import Interval


def run_all(experiment: Experiment, preset: str, config: Any) -> Result:
    """Carry out a command line: all its methods, streams and seeds; then write and print results.

    With several processes (see `processes.py`) they share each run, one after another, and the
    first one alone writes and knows the rows of what is returned.

    Raises:
        UserError: settings that cannot work, told before any run begins.
    """
    experiment.check(config)
    if not experiment.on_processes:
        torchrun.refuse(experiment.command, f"start it as: python -m dynmoe.{experiment.command}")
    if config.jobs > 1:
        torchrun.refuse(f"--jobs {config.jobs}", "use --jobs 1: its processes share each run")
    processes.join(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    shared = processes.in_turn(lambda: experiment.load(config))
    seeds = range(config.seed, config.seed + config.seeds)
    jobs = {
        stream: {
            label: [
                make_job(
                    experiment, of_others(preset) if others else preset, replace(one, seed=seed),
                    label, shared,
                )
                for seed in seeds
            ]
            for others, (label, one) in enumerate(variants.items())
        }
        for stream, variants in experiment.variants(config, shared).items()
    }  # fmt: skip
    flat = [job for variants in jobs.values() for own in variants.values() for job in own]
    alone, model = config.jobs == 1 or len(flat) == 1, None
    for job in flat:
        if alone or job.done:  # a finished run is opened too, to see that its settings are ours
            done = run_one(experiment, job.preset, job.config, shared)
            model = done.model if job is flat[0] else model
    if processes.rank() > 0:
        return Result(flat[0].folder, (), model)
    run_jobs(flat, Local(config.jobs), experiment.command)
    folder = experiment.report_folder(preset, config, flat[0].folder)
    report(folder, config, shared, results_of(jobs, experiment))
    if preset == "smoke" and experiment.smoke_is_small:
        print("smoke shows that everything works; for numbers that say something: --preset minute")
    return Result(folder, tuple(read_run(job.folder) for job in flat), model)


def report(folder: Path, config: Any, shared: Any, results: Results) -> None:
    """Write up what a command line has run: results.json and comparison.png, and tables.

    Args:
        folder: made where it is missing.
        config: the settings of the command line.
        shared: data and models, see `Experiment.load`.
        results: of all its runs.
    """
    experiment, title = results.experiment, results.experiment.title(config, shared)
    make_folder(folder)
    runs = sum(len(variants) for variants in results.runs.values()) * config.seeds
    if runs > 1:
        entries = {
            stream: {v: entry(results, stream, v) for v in variants}
            for stream, variants in results.runs.items()
        }
        found = {"title": title, "settings": identity(config), "seeds": config.seeds}
        found |= beside(results)
        write_json(folder / "results.json", found | {"streams": entries})
        told = f"{config.seeds} seeds, 95 % t intervals" if config.seeds > 1 else "one seed"
        if chance := experiment.chance(config, shared):
            told += f"; chance: {100 * chance:.3g} %"
            results = replace(results, chance=dict.fromkeys(results.streams, chance))
        experiment.draw(folder / "comparison.png", results, f"{title}\n{told}")
    for stream in results.streams:
        heading = f"{title}: {stream}" if stream else title
        rows = table(results, stream, difference=config.seeds > 1)
        print_table(heading, rows, caption(experiment, config.seeds), experiment.lesser)
    experiment.report_more(folder, config, shared, results)
    print(f"results: {folder}" + (", figure comparison.png" if runs > 1 else ""))


def entry(results: Results, stream: str, variant: str) -> dict[str, Any]:
    """A variant's numbers, and the folder of its runs."""
    runs = results.folders[stream][variant][0].parent.name
    return {"runs": runs, **results.experiment.entry(results, stream, variant)}


def beside(results: Results) -> dict[str, Any]:
    """What the experiment shows beside the runs, by stream, for results.json; {} where nothing."""
    found = {stream: results.experiment.beside(results, stream) for stream in results.streams}
    return {"references": found} if any(found.values()) else {}


def table(results: Results, stream: str, difference: bool = False) -> list[list[str]]:
    """Headings, then a row per variant: its name and its numbers, without those that all lack.

    Last come what the experiment shows beside them, see `Experiment.beside`.

    Args:
        difference: the last column is the difference to the first variant, paired by seed.
    """
    experiment, (first, *others) = results.experiment, results.runs[stream]
    rows = [["method", *(heading for heading, _, _ in experiment.columns)]]
    for variant in (first, *others):
        cells = [variant]
        for _, metric, at in experiment.columns:
            factor, _, digits = experiment.unit(metric)
            interval = results.interval(stream, variant, metric, at)
            cells.append(cell(interval, factor, digits, experiment.lacking(metric)))
        rows.append(cells)
    references = experiment.beside(results, stream)
    for name, summary in references.items():
        cells = [name]
        for _, metric, at in experiment.columns:
            factor, _, digits = experiment.unit(metric)
            point = Interval(experiment.value(summary, metric, at), math.nan, math.nan)
            cells.append(cell(point, factor, digits, experiment.lacking(metric)))
        rows.append(cells)
    known = [i for i, cells in enumerate(zip(*rows[1:], strict=True)) if any(cells)]
    rows = [[row[i] for i in known] for row in rows]
    if difference and others:
        factor, _, digits = experiment.unit(experiment.metric)
        gaps = [cell(results.difference(stream, v, first), factor, digits) for v in others]
        named = f"{experiment.metric.replace('_', ' ')} minus {first}"
        for row, text in zip(rows, (named, "", *gaps, *[""] * len(references)), strict=True):
            row.append(text)
    return rows


def caption(experiment: Experiment, seeds: int) -> str:
    """What the numbers of a table are."""
    unit = ", shares in %" if experiment.unit(experiment.metric)[0] == 100 else ""
    legend = f"; {experiment.legend}" if experiment.legend else ""
    told = f"mean over {seeds} seeds [95 % t interval]" if seeds > 1 else "one seed"
    return told + unit + legend


def cell(interval: Interval, factor: float, digits: int, missing: str = "") -> str:
    """Point and ends; `missing` where the metric is not known."""
    if math.isnan(interval.point):
        return missing
    point, low, high = (factor * x for x in interval)
    known = low == low and (digits or low < high)  # a count that all seeds share has no interval
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if known else ""
    return f"{point:,.{digits}f}{ends}"


def print_table(
    title: str, rows: list[list[str]], caption: str = "", lesser: Sequence[str] = ()
) -> None:
    """Print headings and rows on the terminal, the first column to the left.

    A table that is too wide has its intervals on lines of their own. If that does not help, the
    `lesser` columns lose theirs, and what still does not fit is another table below. Without a
    terminal 80 columns are taken.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # a label is shown as it was given
    parts = fit(rows, console.width)
    if len(parts) > 1 and lesser:
        cut = [place for place, heading in enumerate(rows[0]) if heading in lesser]
        short = [
            [text.split(" [")[0] if place in cut else text for place, text in enumerate(row)]
            for row in rows
        ]
        fewer = fit(short, console.width)
        if len(fewer) < len(parts):
            parts, caption = fewer, f"{caption}; a wider terminal shows all intervals"
    for number, part in enumerate(parts):
        more = number > 0
        shown = Table(title=None if more else title, caption=None if more else caption)
        for place, heading in enumerate(part[0]):
            shown.add_column(heading, justify="right" if place else "left")
        for row in part[1:]:
            shown.add_row(*row)
        console.print(shown)


def fit(rows: list[list[str]], width: int) -> list[list[list[str]]]:
    """A table as one or several of at most `width` letters; each has the first column.

    A first column that leaves no room for another one is wrapped when it is printed.
    """
    if _width(rows) <= width:
        return [rows]
    rows = [[first, *(cell.replace(" [", "\n[") for cell in rest)] for first, *rest in rows]
    rows[0] = [heading.replace(" ", "\n") for heading in rows[0]]
    parts, columns = [], [0]
    for number in range(1, len(rows[0])):
        if len(columns) > 1 and _width(rows, [*columns, number]) > width:
            parts.append(columns)
            columns = [0]
        columns.append(number)
    return [[[row[i] for i in own] for row in rows] for own in [*parts, columns]]


def _width(rows: list[list[str]], columns: list[int] | None = None) -> int:
    """Letters of a line of the printed table, or of some of its columns."""
    chosen = range(len(rows[0])) if columns is None else columns
    longest = (max(len(line) for row in rows for line in row[i].split("\n")) for i in chosen)
    return 1 + sum(letters + 3 for letters in longest)

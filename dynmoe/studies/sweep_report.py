"""What a sweep leaves: results.json, a figure, and a table, one maker per command.

`runs` are the summaries of the finished runs, variant -> [seeds].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynmoe.lab.files import make_folder, write_json

Runs = dict[str, list[dict[str, Any]]]
METRICS = ("train_accuracy", "test_accuracy", "online_accuracy")


def report(
    command: str, folder: Path, settings: dict[str, Any], flags: dict[str, str], runs: Runs
) -> None:
    """Write results.json and the figure to `folder`; print a table.

    Args:
        command: "cl" or "rl".
        folder: its name is the sweep's.
        settings: `flags` of every run and the number of `seeds`.
        flags: variant -> its own flags.
        runs: variant -> summaries, one per seed.
    """
    make_folder(folder)
    maker = {"cl": _continual, "rl": _reinforcement}[command]
    maker(folder, settings, flags, runs)
    print(f"results: {folder}")


def _continual(folder: Path, settings: dict[str, Any], flags: dict[str, str], runs: Runs) -> None:
    """Accuracies over the tasks."""
    from dynmoe.lab.figures import band_figure
    from dynmoe.lab.statistics import confidence_interval

    subjects = {f"{run['dataset']}, {run['protocol']} stream" for s in runs.values() for run in s}
    title = f"{folder.name}: {'; '.join(sorted(subjects))}"
    columns = ("first task", "last task", "mean over tasks")
    results: dict[str, Any] = {"title": title, **settings, "variants": {}}
    rows = []
    for label, seeds in runs.items():
        entry: dict[str, Any] = {"flags": flags[label]}
        for metric in METRICS:
            values = [[task[metric] for task in run["tasks"]] for run in seeds]
            entry[metric] = values
            entry[f"{metric}_summary"] = {
                "first task": _interval(confidence_interval([v[0] for v in values], "mean")),
                "last task": _interval(confidence_interval([v[-1] for v in values], "mean")),
                "mean over tasks": _interval(
                    confidence_interval([sum(v) / len(v) for v in values], "mean")
                ),
            }
        results["variants"][label] = entry
        cells = [_cell(entry["train_accuracy_summary"][column], 100) for column in columns]
        rows.append((label, *cells, _cell(entry["test_accuracy_summary"]["last task"], 100)))
    write_json(folder / "results.json", results)
    band_figure(folder / "plasticity.png", results, title)
    heading = f"{title}; train accuracy at task end, {settings['seeds']} seeds"
    _print(heading, ("variant", *columns, "test, last task"), rows, "in %")


def _reinforcement(
    folder: Path, settings: dict[str, Any], flags: dict[str, str], runs: Runs
) -> None:
    """Episodic returns over the environment steps."""
    from agents.figures import learning_figure
    from agents.statistics import learning_curve
    from dynmoe.lab.statistics import confidence_interval

    subjects = {run["env"] for seeds in runs.values() for run in seeds}
    title = f"{folder.name}: {'; '.join(sorted(subjects))}"
    results: dict[str, Any] = {"title": title, **settings, "variants": {}}
    rows, curves = [], {}
    for label, seeds in runs.items():
        entry: dict[str, Any] = {
            "flags": flags[label],
            "parameters": seeds[0]["parameters"],
            "curves": [run["curve"] for run in seeds],
            "final_return": [run["final_return"] for run in seeds],
        }
        cells = ["no episode ended"] * 2
        if None not in entry["final_return"]:
            entry["final_mean"] = _interval(confidence_interval(entry["final_return"], "mean"))
            entry["final_iqm"] = _interval(confidence_interval(entry["final_return"], "iqm"))
            cells = [_cell(entry[key]) for key in ("final_mean", "final_iqm")]
        results["variants"][label] = entry
        curves[label] = learning_curve(seeds)
        rows.append((label, *cells, f"{entry['parameters']:,}"))
    write_json(folder / "results.json", results)
    most = {run["max_return"] for seeds in runs.values() for run in seeds}
    most_return = most.pop() if len(most) == 1 else None
    learning_figure(folder / "learning.png", curves, title, most_return)
    heading = f"{title}; return over the last tenth of training, {settings['seeds']} seeds"
    _print(heading, ("variant", "mean", "IQM", "parameters"), rows, "of episodic returns")


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], unit: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=f"mean over seeds [95 % t interval], {unit}")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def _interval(interval: Any) -> list[float | None]:
    """(point, low, high) for JSON; ends that are not known, with a single seed, become null."""
    return [None if x != x else float(x) for x in interval]


def _cell(interval: list[float | None], factor: float = 1.0) -> str:
    point, low, high = (None if x is None else factor * x for x in interval)
    digits = 1 if factor == 100 else 2
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{point:.{digits}f}{ends}"

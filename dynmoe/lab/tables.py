"""Result tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_tasks(summary: dict[str, Any], title: str) -> None:
    """One row per task of a finished run."""
    table = Table(title=title)
    for column in ("task", "train", "test", "online", "experts", "parameters"):
        table.add_column(column, justify="right")
    for number, task in enumerate(summary["tasks"], start=1):
        table.add_row(
            str(number),
            *(f"{100 * task[f'{key}_accuracy']:.1f} %" for key in ("train", "test", "online")),
            str(task["num_experts"]),
            f"{task['parameters']:,}",
        )
    Console().print(table)


def print_methods(summaries: dict[str, dict[str, Any]], title: str) -> None:
    """One row per method: end-of-task train accuracy over the stream, and what was learnt of it."""
    table = Table(title=title, caption="train accuracy at the end of each task; one seed")
    for column in ("method", "first task", "last task", "mean", "worst", "slope per task", "test"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, summary in summaries.items():
        train, test = (summary["plasticity"][f"{k}_accuracy"] for k in ("train", "test"))
        first, last = (summary["tasks"][i]["train_accuracy"] for i in (0, -1))
        shares = (f"{100 * x:.1f} %" for x in (first, last, train["mean"], train["min"]))
        slope = f"{100 * train['slope']:+.1f} points"
        table.add_row(name, *shares, slope, f"{100 * test['mean']:.1f} %")
    Console().print(table)

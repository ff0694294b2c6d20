"""What a study leaves: results.json, a figure, a table per stream, and the verdict."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

from dynmoe.figures import COLORS
from dynmoe.files import write_atomic, write_json
from dynmoe.stats import Interval, bootstrap_interval
from dynmoe.study_design import Results, Study

COLUMNS = (
    ("first task", "train_accuracy", "first"),
    ("last task", "train_accuracy", "last"),
    ("mean", "train_accuracy", "mean"),
    ("online, mean", "online_accuracy", "mean"),
    ("test, mean", "test_accuracy", "mean"),
)
"""Heading, metric, and which of the tasks."""
FEW_SEEDS = (
    "Intervals are nominal 95 % percentile bootstraps over {seeds} seeds, and narrow (about 75 % "
    "covered at 3 seeds, 83 % at 5): what ends near 0 needs more seeds."
)
PANELS = (("train_accuracy", "train accuracy at task end"), ("online_accuracy", "online accuracy"),
          ("test_accuracy", "test accuracy at task end"))  # fmt: skip


def report(
    study: Study,
    preset: str,
    seeds: int,
    flags: list[str],
    variants: dict[str, dict[str, str]],
    results: Results,
    out: Path,
) -> None:
    """Write everything to `out`, and print the tables and the verdict.

    Args:
        variants: stream -> variant -> its flags, with what a search has chosen.
    """
    out.mkdir(parents=True, exist_ok=True)
    verdict = study.verdict(results)
    if seeds < 10:
        verdict.append(FEW_SEEDS.format(seeds=seeds))
    if study.more_seeds:
        verdict.append(study.more_seeds)
    command = f"python -m dynmoe.study {study.name} --preset {preset} --seeds {seeds}"
    write_json(
        out / "results.json",
        {
            "study": study.name,
            "question": (study.__doc__ or "").split("\n")[0],
            "command": " ".join([command, *(["--", *flags] if flags else [])]),
            "commit": _commit(),
            "seeds": seeds,
            "verdict": verdict,
            "streams": {
                stream: {
                    variant: {"flags": variants[stream][variant],
                              "runs": results.folders[stream][variant][0].parent.name,
                              **_figures(study, results, stream, variant)}
                    for variant in results.runs[stream]
                }
                for stream in results.streams
            },
        },
    )  # fmt: skip
    draw = _draw_returns if study.command == "rl" else _draw_tasks
    draw(out / "figure.png", study, results, seeds)
    _print(study, results, seeds)
    for sentence in verdict:
        print(f"- {sentence}")
    print(f"results: {out}")


def _figures(study: Study, results: Results, stream: str, variant: str) -> dict[str, Any]:
    """One variant's numbers: every seed and task, and intervals."""
    runs = results.runs[stream][variant]
    if study.command == "rl":
        returns = results.values(stream, variant, "final_return")
        return {
            "final_return": returns,
            "final_return_mean": _three(bootstrap_interval(returns, "mean")),
            "final_return_iqm": _three(bootstrap_interval(returns, "iqm")),
            "parameters": runs[0]["parameters"],
            "curves": [run["curve"] for run in runs],
        }
    entry: dict[str, Any] = {"parameters": runs[0]["tasks"][-1]["parameters"]}
    for metric, _ in PANELS:
        tasks = results.tasks(stream, variant, metric)
        entry[metric] = [[round(x, 4) for x in seed] for seed in tasks]
        by_task = [list(task) for task in zip(*tasks, strict=True)]
        entry[f"{metric}_iqm"] = _three(bootstrap_interval(by_task, "iqm"))
        for at in ("first", "last", "mean"):
            interval = results.interval(stream, variant, metric, at)
            entry[f"{metric}_{at}"] = _three(interval)
    for title, tag in study.tags:
        entry[title] = [[round(x, 4) for x in s] for s in results.scalars(stream, variant, tag)]
    return entry


def _print(study: Study, results: Results, seeds: int) -> None:
    from rich.console import Console
    from rich.table import Table

    for stream in results.streams:
        caption = "mean over seeds [95 % bootstrap interval]"
        table = Table(title=f"{study.name}: {stream}, {seeds} seeds", caption=caption)
        table.add_column("variant")
        if study.command == "rl":
            table.add_column("final return", justify="right")
            for variant in results.runs[stream]:
                interval = results.interval(stream, variant, "final_return")
                table.add_row(variant, _cell(interval, 1, 2))
        else:
            for heading, _, _ in COLUMNS:
                table.add_column(heading, justify="right")
            for variant in results.runs[stream]:
                intervals = [results.interval(stream, variant, m, at) for _, m, at in COLUMNS]  # type: ignore[arg-type]
                table.add_row(variant, *(_cell(i, 100, 1) for i in intervals))
        Console(width=140).print(table)


def _draw_tasks(path: Path, study: Study, results: Results, seeds: int) -> None:
    """A row of panels per stream: train, online and test accuracy over the tasks."""
    figure = _new_figure(study, seeds, 3.6 * len(results.streams))
    grid = figure.subplots(len(results.streams), len(PANELS), squeeze=False)
    for stream, row in zip(results.streams, grid, strict=True):
        for axes, (metric, label) in zip(row, PANELS, strict=True):
            for number, variant in enumerate(results.runs[stream]):
                by_task = list(zip(*results.tasks(stream, variant, metric), strict=True))
                intervals = [bootstrap_interval(list(task), "mean") for task in by_task]
                _band(axes, range(1, len(by_task) + 1), intervals, number, variant, 100)
            axes.set(title=stream, xlabel="task", ylabel=f"{label} (%)", ylim=(0, 103))
    _save(figure, path)


def _draw_returns(path: Path, study: Study, results: Results, seeds: int) -> None:
    """A panel per stream: mean episodic return over the environment steps."""
    figure = _new_figure(study, seeds, 4.2)
    grid = figure.subplots(1, len(results.streams), squeeze=False)
    for stream, axes in zip(results.streams, grid[0], strict=True):
        for number, (variant, runs) in enumerate(results.runs[stream].items()):
            steps = [step for step, _ in runs[0]["curve"]]
            points = zip(*([value for _, value in run["curve"]] for run in runs), strict=True)
            whole = [(s, p) for s, p in zip(steps, points, strict=True) if None not in p]
            intervals = [bootstrap_interval(list(p), "mean") for _, p in whole]
            _band(axes, [s for s, _ in whole], intervals, number, variant, 1)
        axes.set(title=stream, xlabel="environment steps", ylabel="episodic return")
    _save(figure, path)


def _new_figure(study: Study, seeds: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    figure.suptitle(f"{study.name} ({seeds} seeds)", fontsize=11)
    return figure


def _band(
    axes: Any, x: Any, intervals: list[Interval], number: int, label: str, factor: float
) -> None:
    """A line, and the band of its intervals."""
    color, style = COLORS[number % len(COLORS)], "--" if number >= len(COLORS) else "-"
    point, low, high = (
        [factor * getattr(i, end) for i in intervals] for end in ("point", "low", "high")
    )
    axes.plot(x, point, style, marker="o", markersize=3, color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside right upper")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={})
    write_atomic(path, buffer.getvalue())


def _commit() -> str | None:
    """The commit of this checkout; None outside one."""
    folder = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
    )
    return found.stdout.strip() or None


def _three(interval: Interval) -> list[float | None]:
    """(point, low, high) for JSON; ends that are not known become null."""
    return [None if x != x else round(float(x), 4) for x in interval]


def _cell(interval: Interval, factor: float, digits: int) -> str:
    point, low, high = (factor * x for x in interval)
    ends = "" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{point:.{digits}f}{ends}"

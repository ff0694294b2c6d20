"""What a study leaves: results.json, a figure, and study.md with tables and verdict."""

from __future__ import annotations

import inspect
import json
import math
import shlex
from pathlib import Path
from typing import Any

from dynmoe.lab.files import make_folder, write_atomic, write_json
from dynmoe.lab.statistics import Interval
from dynmoe.studies.design import Results, Study

CAPTION = "Mean over seeds [95 % t interval]"
FEW_SEEDS = (
    "Intervals are 95 % t intervals, wide at {seeds} seeds: what is not seen may be there. Where "
    "N seeds are said to see it, a difference of the size found would show at N with a chance of "
    "80 %, as far as these seeds can tell."
)
TWO_SEEDS = (
    "Of two seeds an interval reaches 12.7 standard errors to each side: it sees next to nothing."
)


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
    make_folder(out)
    verdict = study.verdict(results)
    if seeds < 10:
        verdict.append(FEW_SEEDS.format(seeds=seeds))
    if seeds == 2:
        verdict.append(TWO_SEEDS)
    command = f"python -m dynmoe.study {study.name} --preset {preset} --seeds {seeds}"
    command += f" -- {shlex.join(flags)}" if flags else ""
    commits = _commits(results)
    write_json(
        out / "results.json",
        {
            "study": study.name,
            "question": inspect.getdoc(study),
            "command": command,
            "commits": commits,
            "seeds": seeds,
            "verdict": verdict,
            "streams": {
                stream: {
                    variant: {"flags": variants[stream][variant],
                              "runs": results.folders[stream][variant][0].parent.name,
                              **results.view.entry(results, stream, variant),
                              **_logged(study, results, stream, variant)}
                    for variant in results.runs[stream]
                }
                for stream in results.streams
            },
        },
    )  # fmt: skip
    results.view.draw(out / "figure.png", results, f"{study.name} ({seeds} seeds)")
    tables = {stream: _table(results, stream, variants[stream]) for stream in results.streams}
    text = _markdown(study, command, commits, seeds, tables, verdict)
    write_atomic(out / "study.md", text.encode())
    _print(study, tables, seeds)
    for sentence in verdict:
        print(f"- {sentence}")
    print(f"results: {out}")


def _logged(study: Study, results: Results, stream: str, variant: str) -> dict[str, Any]:
    """What the runs have logged under the study's tags: [S][points] each."""
    return {
        title: [[round(x, 4) for x in seed] for seed in results.scalars(stream, variant, tag)]
        for title, tag in study.tags
    }


def _table(results: Results, stream: str, flags: dict[str, str]) -> list[list[str]]:
    """Headings, then a row per variant: its name, its numbers, its flags."""
    view = results.view
    rows = [["variant", *(heading for heading, _, _ in view.columns), "flags"]]
    for variant in results.runs[stream]:
        cells = []
        for _, metric, at in view.columns:
            factor, _, digits = view.unit(metric)
            cells.append(_cell(results.interval(stream, variant, metric, at), factor, digits))
        rows.append([variant, *cells, flags[variant]])
    return rows


def _markdown(
    study: Study,
    command: str,
    commits: list[str],
    seeds: int,
    tables: dict[str, list[list[str]]],
    verdict: list[str],
) -> str:
    """The study as a page."""
    lines = [f"# {study.name}", "", inspect.getdoc(study) or "", "", "```bash", command, "```", ""]
    lines += [f"{CAPTION}; {seeds} seeds; runs made on commit {', '.join(commits)}.", ""]
    for stream, rows in tables.items():
        rule = ["---"] * len(rows[0])
        marked = [[*row[:-1], f"`{row[-1]}`" if row[-1] else ""] for row in rows[1:]]
        lines += [f"## {stream}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (rows[0], rule, *marked)] + [""]
    lines += ["## Verdict", "", *(f"- {sentence}" for sentence in verdict), ""]
    return "\n".join([*lines, f"![{study.name}](figure.png)", ""])


def _print(study: Study, tables: dict[str, list[list[str]]], seeds: int) -> None:
    from rich.console import Console
    from rich.table import Table

    for stream, (headings, *rows) in tables.items():
        table = Table(title=f"{study.name}: {stream}, {seeds} seeds", caption=CAPTION)
        for number, heading in enumerate(headings[:-1]):
            table.add_column(heading, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row[:-1])
        Console(width=140).print(table)


def _commits(results: Results) -> list[str]:
    """The commits that the runs were made on, sorted; of unknown ones "?"."""
    found = set()
    for variants in results.folders.values():
        for folder in (f for folders in variants.values() for f in folders):
            sessions = json.loads((folder / "environment.json").read_text())["sessions"]
            found |= {session["commit"] or "?" for session in sessions}
    return sorted(found)


def _cell(interval: Interval, factor: float, digits: int) -> str:
    """Point and ends; nothing where the metric is not known."""
    if math.isnan(interval.point):
        return ""
    point, low, high = (factor * x for x in interval)
    known = low == low and (digits or low < high)  # a count that all seeds share has no interval
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if known else ""
    return f"{point:,.{digits}f}{ends}"

"""What a study leaves: results.json, a figure, a table per stream, and the verdict."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

from dynmoe.files import write_json
from dynmoe.stats import Interval
from dynmoe.study_design import Results, Study

FEW_SEEDS = (
    "Intervals are nominal 95 % percentile bootstraps over {seeds} seeds, and narrow (about 75 % "
    "covered at 3 seeds, 83 % at 5): what ends near 0 needs more seeds."
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
                              **results.view.entry(results, stream, variant),
                              **_logged(study, results, stream, variant)}
                    for variant in results.runs[stream]
                }
                for stream in results.streams
            },
        },
    )  # fmt: skip
    results.view.draw(out / "figure.png", results, f"{study.name} ({seeds} seeds)")
    _print(study, results, seeds)
    for sentence in verdict:
        print(f"- {sentence}")
    print(f"results: {out}")


def _logged(study: Study, results: Results, stream: str, variant: str) -> dict[str, Any]:
    """What the runs have logged under the study's tags: [S][points] each."""
    return {
        title: [[round(x, 4) for x in seed] for seed in results.scalars(stream, variant, tag)]
        for title, tag in study.tags
    }


def _print(study: Study, results: Results, seeds: int) -> None:
    from rich.console import Console
    from rich.table import Table

    view = results.view
    for stream in results.streams:
        caption = "mean over seeds [95 % bootstrap interval]"
        table = Table(title=f"{study.name}: {stream}, {seeds} seeds", caption=caption)
        table.add_column("variant")
        for heading, _, _ in view.columns:
            table.add_column(heading, justify="right")
        for variant in results.runs[stream]:
            cells = []
            for _, metric, at in view.columns:
                factor, _, digits = view.unit(metric)
                cells.append(_cell(results.interval(stream, variant, metric, at), factor, digits))
            table.add_row(variant, *cells)
        Console(width=140).print(table)


def _commit() -> str | None:
    """The commit of this checkout; None outside one."""
    folder = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
    )
    return found.stdout.strip() or None


def _cell(interval: Interval, factor: float, digits: int) -> str:
    """Point and ends; nothing where the metric is not known."""
    if math.isnan(interval.point):
        return ""
    point, low, high = (factor * x for x in interval)
    ends = "" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{point:,.{digits}f}{ends}"

"""Tables of study pages made before 0.2: t intervals in place of percentile bootstraps."""

from __future__ import annotations

import math
from pathlib import Path

from dynmoe.lab.experiment import Results
from dynmoe.lab.files import write_atomic
from dynmoe.lab.report import cell

BEFORE, NOW = "[95 % bootstrap interval]", "[95 % t interval]"
NOTE = (
    "The intervals of the tables are t intervals, computed again from results.json; a mean without "
    "one is of numbers that it does not hold for every seed. The verdict below is that of the "
    "runs' time, with percentile bootstraps."
)


def renew_tables(page: Path, results: Results) -> bool:
    """Give the tables of a study's page t intervals in place of percentile bootstraps.

    A number that results.json does not hold for every seed keeps its mean and loses its interval.

    Args:
        page: its study.md. One that has t intervals already, or is not there, is left alone.
        results: what its results.json holds.

    Returns:
        Whether it was rewritten.
    """
    if not page.is_file() or BEFORE not in (text := page.read_text()):
        return False
    head, verdict, rest = text.partition("\n## Verdict\n")
    lines, stream, headings = [], "", list[str]()
    for line in head.replace(BEFORE, NOW).splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("## "):
            stream = line.removeprefix("## ")
        elif line.startswith("|") and cells[0] in ("variant", "method"):
            headings = cells
        elif line.startswith("|") and cells[0] in results.runs.get(stream, {}):
            cells[1:-1] = [
                _renewed(results, stream, cells[0], heading, old)
                for heading, old in zip(headings[1:-1], cells[1:-1], strict=True)
            ]
            line = f"| {' | '.join(cells)} |"
        lines.append(line)
    new = "\n".join([*lines, "", NOTE, ""]) + verdict + rest
    write_atomic(page, new.encode())
    return True


def _renewed(results: Results, stream: str, variant: str, heading: str, old: str) -> str:
    """A cell again: with its t interval where the mean of the seeds' numbers is still the same."""
    mean = old.split(" [")[0]
    for name, metric, at in results.experiment.columns:
        if name != heading or not mean:
            continue
        try:
            interval = results.interval(stream, variant, metric, at)
        except (KeyError, TypeError):
            continue
        factor, _, digits = results.experiment.unit(metric)
        if math.isclose(factor * interval.point, float(mean.replace(",", "")), abs_tol=0.101):
            return cell(interval, factor, digits)
    return mean

"""`python -m dynmoe.report RUNS...`: finished runs of any command as one page, without the network.

    python -m dynmoe.report runs/cl/laptop-* --out report --question "Does growth keep plasticity?"
    python -m dynmoe.report runs/study/granularity-laptop

RUNS are folders of runs, folders above them, or folders with the results of a study or a sweep.
Runs that differ only in the seed are one variant; all variants are compared with the first one.
The folder of results gets report.html, tables for LaTeX and as CSV, and figures as PDF and SVG.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from dynmoe.commands import begin, load
from dynmoe.errors import UserError
from dynmoe.lab.config import placed, run_command
from dynmoe.lab.options import read_options

begin("report", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.finished import Collection, Command, with_first  # noqa: E402
from dynmoe.lab.html_report import write_report  # noqa: E402

RUN_COMMANDS = ("cl", "rl", "tta", "dg")
"""Those whose runs can be read."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a report."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """folders of runs, folders above them, or those with the results.json of a study or a sweep"""
    out: Path = Path("runs/report")
    """where the page, tables and figures go"""
    title: str = "Report of runs"
    """of the page"""
    question: str = ""
    """what the runs are to answer; it stands above them"""
    first: str = ""
    """the variant that the others are compared with; none: the first of the first folder"""
    runs_dir: Path = Path("runs")
    """where runs that a study names are looked for, if they are not in its own folder's"""
    debug: bool = False
    """show the traceback of an error"""


def main(argv: list[str]) -> None:
    """Read the runs, say which are left out, and write the page.

    Raises:
        UserError: no folders are named, or none holds a finished run.
    """
    config = read_options(Config, argv, "python -m dynmoe.report", __doc__)
    if not config.runs:
        raise UserError("name the folders of runs, such as: dynmoe report runs/cl/laptop-*")
    commands = {name: partial(_command, name) for name in RUN_COMMANDS}
    found = Collection(commands, config.runs_dir)
    for path in config.runs:
        found.add(path)
    groups = found.groups()
    if not groups:
        first, *others = found.left_out
        more = f", and {len(others)} more" if others else ""
        raise UserError(f"no finished run to report: {first}{more}; give folders such as runs/cl")
    groups = with_first(groups, config.first)
    for one in found.left_out:
        print(f"warning: {one}", file=sys.stderr)
    write_report(config.out, groups, found.left_out, config.title, config.question)
    print(f"report: {config.out / 'report.html'}")


def _command(name: str) -> Command:
    module = load(name)
    settings = next(iter(module.presets().values()))
    return Command(module.experiment(), placed(settings))


if __name__ == "__main__":
    run_command(main)

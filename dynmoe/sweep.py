"""`python -m dynmoe.sweep`: a command over variants and seeds, compared with intervals.

    python -m dynmoe.sweep cl --name class --seeds 5
        --variants "dense: --method dense" "g2: --granularity 2" -- --protocol class

What follows `--` are flags of every run. Each run is a run of the command itself, in a folder of
its own; finished ones are read, unfinished ones resumed, so a sweep can be stopped and started
again at will. A sweep with other flags under the same name is refused: it takes another --name.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from dynmoe.commands import begin
from dynmoe.errors import UserError
from dynmoe.lab.config import run_command

begin("sweep", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.jobs import make_jobs, run_jobs  # noqa: E402
from dynmoe.studies.sweep_report import report  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a sweep."""

    command: Annotated[Literal["cl", "rl"], tyro.conf.Positional] = "cl"
    """the command to run"""
    variants: tuple[str, ...] = ("dense: --method dense", "g2: --granularity 2")
    """what is compared, each as "label: flags" """
    flags: tyro.conf.Suppress[tuple[str, ...]] = ()
    name: str = "sweep"
    """names the sweep's folder and its runs"""
    seeds: int = 5
    """seeds 0 .. N-1 of each variant"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each a process"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    debug: bool = False
    """show the traceback of an error"""


def main(argv: list[str]) -> None:
    """Run what is not finished yet, then write results.json and the figure, and print the table."""
    cut = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(Config, args=argv[:cut], prog="python -m dynmoe.sweep", description=__doc__)
    config = replace(config, flags=tuple(argv[cut + 1 :]))
    variants = _check(config)
    jobs = {
        label: make_jobs(config.command, f"{config.name}/{label}", [*config.flags, *flags],
                         range(config.seeds), config.runs_dir, label)
        for label, flags in variants.items()
    }  # fmt: skip
    in_turn = [job for seed_jobs in zip(*jobs.values(), strict=True) for job in seed_jobs]
    run_jobs(in_turn, config.jobs, config.name)
    runs = {label: [job.summary() for job in jobs[label]] for label in variants}
    settings = {"flags": shlex.join(config.flags), "seeds": config.seeds}
    flags = {label: shlex.join(chosen) for label, chosen in variants.items()}
    report(config.command, config.runs_dir / "sweep" / config.name, settings, flags, runs)


def _check(config: Config) -> dict[str, list[str]]:
    """Variant -> its flags.

    Raises:
        UserError: numbers that cannot work, a variant that cannot be read or is named twice.
    """
    for name in ("seeds", "jobs"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is too small; use 1 or more")
    parsed = [_parse(text) for text in config.variants]
    if not parsed:
        raise UserError('--variants needs one or more, such as "g2: --granularity 2"')
    labels = [label for label, _ in parsed]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"variant {label!r} is named twice; name each once")
    return dict(parsed)


def _parse(text: str) -> tuple[str, list[str]]:
    label, colon, flags = text.partition(":")
    if not colon or not label.strip():
        raise UserError(f'variant {text!r} must read "label: flags", such as "g2: --granularity 2"')
    return label.strip(), shlex.split(flags)


if __name__ == "__main__":
    run_command(main)

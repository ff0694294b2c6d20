"""`python -m dynmoe.sweep`: a command over variants and seeds, compared with intervals.

    python -m dynmoe.sweep cl --seeds 5
        --variants "dense: --method dense" "g2: --granularity 2" -- --protocol class

What follows `--` are flags of every run. A sweep is a study without a question of its own: its runs
are in folders named after their settings, finished ones are read, unfinished ones resumed. Results
go to runs/sweep/NAME.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dynmoe.commands import begin, load
from dynmoe.errors import UserError
from dynmoe.lab.config import run_command

begin("sweep", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.comparison import Results  # noqa: E402
from dynmoe.lab.study import Command, Preset, Study, run_study  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a sweep."""

    command: Annotated[Command, tyro.conf.Positional] = "cl"
    """the command to run"""
    variants: tuple[str, ...] = ("dense: --method dense", "g2: --granularity 2")
    """what is compared, each as "label: flags"; the others are told against the first"""
    name: str | None = None
    """names the folder of the results; none: the command and a hash of what is swept"""
    seeds: int = 5
    """seeds 0 .. N-1 of each variant"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each a process"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    debug: bool = False
    """show the traceback of an error"""


class Sweep(Study):  # not registered: it is made of a command line
    """What a command finds with each of several sets of flags."""

    def __init__(self, name: str, chosen: dict[str, str]) -> None:
        self.name, self.chosen = name, chosen  # type: ignore[misc]

    def streams(self, preset: Preset) -> dict[str, str]:
        """One, without a name; the flags of all runs are added to it."""
        return {"": ""}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Those of the command line."""
        return self.chosen

    def verdict(self, results: Results) -> list[str]:
        """Each against the first."""
        first, *others = self.chosen
        return [results.says("", other, first) for other in others]


def main(argv: list[str]) -> None:
    """Run what is not finished yet; write the results, the figure and the page."""
    cut = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(Config, args=argv[:cut], prog="python -m dynmoe.sweep", description=__doc__)
    flags, chosen = argv[cut + 1 :], read_variants(config.variants)
    for setting in ("seeds", "jobs"):
        if getattr(config, setting) < 1:
            raise UserError(f"--{setting} {getattr(config, setting)} is too small; use 1 or more")
    swept = shlex.join([config.command, "--variants", *config.variants, "--", *flags])
    name = config.name or f"{config.command}-{hashlib.sha256(swept.encode()).hexdigest()[:8]}"
    module = load(config.command)
    run_study(
        Sweep(name, chosen), module.experiment(), module.presets(), flags, config.seeds,
        config.jobs, config.runs_dir, config.runs_dir / "sweep" / name,
        f"python -m dynmoe.sweep --seeds {config.seeds} {swept}",
    )  # fmt: skip


def read_variants(texts: tuple[str, ...]) -> dict[str, str]:
    """Label -> flags.

    Raises:
        UserError: a variant that cannot be read or is named twice, or none at all.
    """
    chosen: dict[str, str] = {}
    for text in texts:
        label, colon, flags = text.partition(":")
        label = label.strip()
        if not colon or not label:
            raise UserError(
                f'variant {text!r} must read "label: flags", such as "g2: --granularity 2"'
            )
        if label in chosen:
            raise UserError(f"variant {label!r} is named twice; name each once")
        chosen[label] = flags.strip()
    if not chosen:
        raise UserError('--variants needs one or more, such as "g2: --granularity 2"')
    return chosen


if __name__ == "__main__":
    run_command(main)

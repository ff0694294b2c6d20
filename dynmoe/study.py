"""`python -m dynmoe.study NAME`: a question, the runs that answer it, and the verdict.

    python -m dynmoe.study --list
    python -m dynmoe.study granularity --preset laptop

A study runs one command many times, several runs at a time. Each run has a folder named after its
settings, so studies share the runs that they have in common. Finished runs are read, unfinished
runs resumed: a study can be stopped and started again at any time.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dynmoe import registry
from dynmoe.commands import begin, load
from dynmoe.errors import UserError
from dynmoe.lab.config import run_command
from dynmoe.lab.options import OF_RUNS, read_options
from dynmoe.ranges import check_settings

begin("study", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.engines import Where  # noqa: E402
from dynmoe.lab.redraw import read_results, redraw  # noqa: E402
from dynmoe.lab.study import Preset, Study, check_preset, run_study  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Config(Where):
    """Settings of a study."""

    study: Annotated[str, tyro.conf.Positional] = ""
    """its name; see --list"""
    list: bool = False
    """show all studies and stop"""
    redraw: tuple[Path, ...] = ()
    """results.json files whose figures are drawn again beside them, without the runs; not of rl"""
    preset: Preset = "laptop"
    """laptop: embedded data, minutes on two cores; paper: the papers' data and length, for GPUs"""
    streams: tuple[str, ...] = ()
    """run only these of the study's streams; all by default"""
    seeds: int = 0
    """seeds 0 .. N-1 of each variant; 0 for the preset's number"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    out: Path | None = None
    """where results, figure and verdict go; by default runs_dir/study/NAME-PRESET"""
    debug: bool = False
    """show the traceback of an error"""


def main(argv: list[str]) -> None:
    """Run what is not finished yet; write the results, the figure and the verdict.

    Raises:
        UserError: a setting is out of range, or there is no such study.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    config = read_options(Config, argv[:cut], "python -m dynmoe.study", __doc__, more=OF_RUNS)
    if config.redraw:
        for file in config.redraw:
            print(f"figure: {draw_again(file)}")
        return
    if config.list or not config.study:
        for name in registry.names("study"):
            print(f"{name}: {registry.summary('study', name)}")
        return
    check_settings(config)
    if config.seeds < 0:
        raise UserError(f"--seeds {config.seeds} is too small; use 1 or more, 0 for the preset's")
    chosen = registry.get("study", config.study)
    registry.check_methods(chosen)
    study: Study = chosen()
    carry_out(study, config, argv[cut + 1 :])


def draw_again(file: Path) -> Path:
    """Draw the figure of a results.json beside it: of a study, or of a sweep or run of cl.

    Raises:
        UserError: no such file, or its figure needs more than it holds.
    """
    found = read_results(file)
    if found.get("study") not in registry.names("study"):
        return redraw(file, found, load("cl").experiment(), None)
    study: Study = registry.get("study", found["study"])()
    return redraw(file, found, study.experiment(load(study.command).experiment()), study)


def carry_out(study: Study, config: Config, flags: list[str]) -> None:
    """Run a study.

    Args:
        flags: more flags for every run, for instance to shorten it.

    Raises:
        UserError: the study has no such preset, or see `run_study`.
    """
    check_preset(study, config.preset)
    seeds = config.seeds or study.seeds[config.preset]
    command = f"python -m dynmoe.study {study.name} --preset {config.preset} --seeds {seeds}"
    command += f" --streams {shlex.join(config.streams)}" if config.streams else ""
    command += f" -- {shlex.join(flags)}" if flags else ""
    out = config.out or config.runs_dir / "study" / f"{study.name}-{config.preset}"
    module = load(study.command)
    run_study(
        study, module.experiment(), module.presets(), flags, range(seeds),
        config.make(config.runs_dir), config.runs_dir, out, command, config.preset, config.streams,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)

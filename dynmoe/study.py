"""`python -m dynmoe.study NAME`: a question, the runs that answer it, and the verdict.

    python -m dynmoe.study --list
    python -m dynmoe.study granularity --preset laptop

Runs are runs of the command that the study is about, each in a folder of its own, several at a
time. The folder is named after the run's settings, so that studies share what they have in common.
Finished runs are read, unfinished ones resumed: a study can be stopped and started again at will.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dynmoe import registry
from dynmoe.commands import begin
from dynmoe.errors import UserError
from dynmoe.lab.config import run_command

begin("study", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.jobs import Job, run_jobs  # noqa: E402
from dynmoe.studies.design import VIEWS, Preset, Results, Study  # noqa: E402

SEARCH_SEED = 1000
"""Searches use a seed that no reported run has."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a study."""

    study: Annotated[str, tyro.conf.Positional] = ""
    """its name; see --list"""
    list: bool = False
    """show all studies and stop"""
    preset: Preset = "laptop"
    """laptop: embedded data, minutes on two cores; paper: the papers' data and length, for GPUs"""
    seeds: int = 0
    """seeds 0 .. N-1 of each variant; 0 for the preset's number"""
    flags: tyro.conf.Suppress[tuple[str, ...]] = ()
    jobs: int = os.cpu_count() or 1
    """runs at a time, each a process"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    out: Path | None = None
    """where results, figure and verdict go; by default runs_dir/study/NAME-PRESET"""
    debug: bool = False
    """show the traceback of an error"""


def main(argv: list[str]) -> None:
    """Run what is not finished yet; write the results, the figure and the verdict."""
    cut = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(
        Config, args=argv[:cut], prog="python -m dynmoe.study", description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    if config.list or not config.study:
        for name in registry.names("study"):
            print(f"{name}: {registry.summary('study', name)}")
        return
    if config.seeds < 0:
        raise UserError(f"--seeds {config.seeds} is too small; use 1 or more, 0 for the preset's")
    if config.jobs < 1:
        raise UserError(f"--jobs {config.jobs} is too small; use 1 or more")
    study: Study = registry.get("study", config.study)()
    run_study(study, config, argv[cut + 1 :])


def run_study(study: Study, config: Config, flags: list[str]) -> None:
    """Choose settings where the study searches, run all seeds, and report.

    Args:
        flags: more flags for every run, for instance to shorten it.
    """
    from dynmoe.studies.report import report

    view = VIEWS[study.command]
    seeds = config.seeds or study.seeds[config.preset]
    variants = dict(study.variants(config.preset))
    streams = study.streams(config.preset)
    bases = {stream: [*shlex.split(common), *flags] for stream, common in streams.items()}
    chosen: dict[str, dict[str, str]] = {}
    for stream, base in bases.items():
        found = variants | _search(study, config, stream, base)
        chosen[stream] = {v: study.flags_on(stream, own) for v, own in found.items()}
    jobs = {
        stream: {
            label: view.jobs([*shlex.split(own), *base], list(range(seeds)), config.runs_dir,
                             f"{stream}, {label}")
            for label, own in chosen[stream].items()
        }
        for stream, base in bases.items()
    }  # fmt: skip
    flat = [job for labels in jobs.values() for seeds_ in labels.values() for job in seeds_]
    run_jobs(flat, config.jobs, study.name)
    results = Results(
        {s: {v: [j.summary() for j in js] for v, js in vs.items()} for s, vs in jobs.items()},
        {s: {v: [j.folder for j in js] for v, js in vs.items()} for s, vs in jobs.items()},
        view,
    )
    out = config.out or config.runs_dir / "study" / f"{study.name}-{config.preset}"
    report(study, config.preset, seeds, flags, chosen, results, out)


def _search(study: Study, config: Config, stream: str, base: list[str]) -> dict[str, str]:
    """The best flags of each variant that is searched, by the mean metric on a seed apart."""
    view = VIEWS[study.command]
    trials = {
        label: {
            own: view.jobs([*shlex.split(own), *base], [SEARCH_SEED], config.runs_dir,
                           f"{stream}, {label} of {own}")[0]
            for own in choices
        }
        for label, choices in study.searches(config.preset).items()
    }  # fmt: skip
    run_jobs([job for t in trials.values() for job in t.values()], config.jobs, "search")

    def score(job: Job) -> float:
        return view.value(job.summary(), view.metric, "mean")

    return {label: max(t, key=lambda own: score(t[own])) for label, t in trials.items()}


if __name__ == "__main__":
    run_command(main)

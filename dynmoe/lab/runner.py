"""Carries runs out: one here, or many, wherever a launcher puts them."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from dynmoe.errors import DynmoeError, Interrupted, Pruned, UserError
from dynmoe.lab import inputs, processes
from dynmoe.lab.config import RunConfig, difference, digest, identity, parse
from dynmoe.lab.early_stop import Bar
from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.files import as_told
from dynmoe.lab.launchers import Failure, Launcher
from dynmoe.lab.progress import RunsShown
from dynmoe.lab.results import flat
from dynmoe.lab.run import Run, check_settings, remove_if_never_begun

OWN = {"--seed", "--seeds", "--jobs", "--name", "--runs-dir", "--resume"}
"""Settings that sweeps, searches and studies give to the runs that they compare."""


@dataclass(frozen=True)
class Done:
    """A finished run."""

    folder: Path
    """the run's"""
    summary: dict[str, Any]
    """its figures"""
    model: nn.Module | None
    """the network, if it was trained by this call"""


def run_one(
    experiment: Experiment, preset: str, config: Any, shared: Any = None, bar: Bar | None = None
) -> Done:
    """Carry out one run, or read what an earlier run of the same settings found.

    Args:
        experiment: what the run does.
        preset: begins the name of its folder where `config.name` is None.
        config: its settings.
        shared: what `experiment.load(config)` gives; None to load it here.
        bar: what the run has to reach to be carried out to its end.

    Raises:
        Pruned: it does not reach the bar.
        DynmoeError: see `Run` and the experiment.
    """
    experiment.check(config)
    if shared is None:
        shared = processes.in_turn(lambda: experiment.load(config))
    model = None
    label, read = experiment.label(config, shared), experiment.inputs(config, shared)
    with Run(experiment.command, preset, config, label, read) as run:
        now = run.summary is None
        if now:
            run.log.bar = bar
            with closing(experiment.prepare(run, config, shared)) as session:
                with session.recorder.progress:
                    if run.restored is not None:
                        session.restore(run.restored)
                        run.restore_generators()  # making and restoring a session may draw
                    session.work()
                summary = session.summary()
                if (chance := experiment.chance(config, shared)) is not None:
                    summary["chance"] = chance
                final = {f"final/{metric}/{at}": experiment.value(summary, metric, at)
                         for _, metric, at in experiment.columns}  # fmt: skip
                known = {tag: value for tag, value in final.items() if not math.isnan(value)}
                run.log.hparams(flat(identity(config), lists=True), known)
                run.finish(summary)
                model = session.model
        if processes.rank() == 0:
            experiment.finished(run, config, shared, now)
        assert run.summary is not None
        return Done(run.folder, run.summary, model)


@dataclass(frozen=True)
class Job:
    """One run, which may be carried out in a process of its own."""

    label: str
    """names it to the user"""
    experiment: Experiment
    """what it does"""
    preset: str
    """begins its folder's name"""
    config: RunConfig
    """its settings"""
    folder: Path
    """where its summary.json will be"""
    bar: Bar | None = None
    """what it has to reach to be carried out to its end"""

    @property
    def done(self) -> bool:
        """Whether its summary is there.

        Raises:
            UserError: the folder holds a run with other settings.
        """
        check_settings(self.folder, self.config)
        return (self.folder / "summary.json").is_file()

    def summary(self) -> Any:
        """The summary of the finished run."""
        return json.loads((self.folder / "summary.json").read_text())


def make_job(experiment: Experiment, preset: str, config: Any, label: str, shared: Any) -> Job:
    """The run of these settings; touches nothing on disk."""
    part = "" if config.name else experiment.label(config, shared)
    run = Run(experiment.command, preset, config, part)
    return Job(f"{label}, seed {config.seed}", experiment, preset, config, run.folder)


def plan(
    experiment: Experiment,
    presets: dict[str, Any],
    argv: list[str],
    seeds: list[int],
    runs_dir: Path,
    label: str,
) -> list[Job]:
    """One run of a command's flags per seed, in a folder named after their settings.

    Studies and sweeps thus share what they have in common.

    Raises:
        UserError: flags that do not fit.
    """
    # Flags for all variants may have no effect in some, such as the dense reference.
    named, argv = settings_in(argv), [*argv, "--allow-unused"]
    preset, config = parse(presets, argv, f"python -m dynmoe.{experiment.command}", "")
    compared = {"--compare"} if config.compare else set()  # without names it changes nothing
    if wrong := sorted(named & (OWN | compared)):
        raise UserError(
            f"{wrong[0]} cannot differ between the runs that are compared, and would have no "
            "effect; the command that compares them sets it, by options before a lone --"
        )
    config = replace(config, compare=())  # a preset's own comparisons are none of the study's
    experiment.check(config)
    config = experiment.settle(config)
    name = f"studies/{config.method.part.name}-{digest(config)}"
    own = {"name": name, "runs_dir": runs_dir, "resume": True}
    found = [replace(config, seed=seed, **own) for seed in seeds]
    return [make_job(experiment, preset, one, label, None) for one in found]


def settings_in(words: Iterable[str]) -> set[str]:
    """The settings that flags name; `--no-x` names `--x`."""
    flags = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    return {re.sub(r"^(--|.*\.)no-", r"\1", flag) for flag in flags}


def results_of(jobs: dict[str, dict[str, list[Job]]], experiment: Experiment) -> Results:
    """Those of finished jobs: stream -> variant -> one per seed.

    Raises:
        UserError: a file that some of them read has changed in between, or one setting has found
            several data sets.
    """
    inputs.check_alike(j.folder for vs in jobs.values() for js in vs.values() for j in js)
    runs = {s: {v: [j.summary() for j in js] for v, js in vs.items()} for s, vs in jobs.items()}
    for stream, variants in jobs.items():
        _check_one_data_set((j, run) for v, js in variants.items()
                            for j, run in zip(js, runs[stream][v], strict=True))  # fmt: skip
    folders = {s: {v: [j.folder for j in js] for v, js in vs.items()} for s, vs in jobs.items()}
    return Results(runs, folders, experiment, chance=chance_of(runs))


def _check_one_data_set(runs: Iterable[tuple[Job, dict[str, Any]]]) -> None:
    """Refuse runs of a stream that had another data set by the same setting, as `auto` finds one.

    Data sets that the user has named, one for each variant, may differ.
    """
    seen: dict[str, tuple[Any, Path]] = {}
    for job, summary in runs:
        found, own = summary.get("dataset"), getattr(job.config, "dataset", None)
        if found is None or own is None:
            continue
        other, where = seen.setdefault(repr(own), (found, job.folder))
        if other != found:
            raise UserError(
                f"{where} was run on {other} and {job.folder} on {found}, so they cannot be "
                "compared; choose one for all runs: --dataset NAME"
            )


def chance_of(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, float]:
    """Stream -> the accuracy of guesses, where all its runs know it and agree; see `Results`."""
    found: dict[str, float] = {}
    for stream, variants in runs.items():
        levels = {run.get("chance") for own in variants.values() for run in own}
        level = levels.pop() if len(levels) == 1 else None
        if level is not None:
            found[stream] = level
    return found


def run_jobs(
    jobs: list[Job], launcher: Launcher, title: str, retries: int = 0, keep_going: bool = False
) -> None:
    """Run all jobs that are not done.

    Args:
        jobs, launcher, title, retries, keep_going: see `try_jobs`.

    Raises:
        UserError: jobs of one folder differ in their settings, or the folder holds others.
        DynmoeError: a run failed; its message and exit code are passed on. Several are told one by
            one on stderr, and the exit code is theirs if they share it.
    """
    failed = try_jobs(jobs, launcher, title, retries, keep_going)
    if failed:
        raise _told(failed)


def try_jobs(
    jobs: list[Job], launcher: Launcher, title: str, retries: int = 0, keep_going: bool = False
) -> list[tuple[Job, Failure]]:
    """Run all jobs that are not done, and return those that failed.

    Jobs of one folder and the same settings are one run. Folders of runs that never began are
    removed.

    Args:
        jobs: the runs.
        launcher: where.
        title: shown with the progress.
        retries: further attempts, each when all others are done, at a run that failed for another
            reason than its settings; it goes on from its newest checkpoint.
        keep_going: carry out all others when one fails; else its failure stops those not begun.

    Raises:
        UserError: jobs of one folder differ in their settings, or the folder holds others.
    """
    jobs = _distinct(jobs)
    todo = [job for job in jobs if not job.done]
    if not todo:
        return []
    launcher.check()
    failed: dict[Path, Failure] = {}
    with RunsShown(title, len(jobs), len(jobs) - len(todo)) as shown:
        try:
            again = todo
            for _ in range(1 + retries):
                if not again:
                    break
                with closing(_launched(launcher, again)) as ended:
                    for job, failure in ended:
                        failed.pop(job.folder, None)
                        if failure is not None:
                            failed[job.folder] = failure
                        if failure is not None and not keep_going:  # told as the error
                            return [(job, failure)]
                        shown.ended(
                            job.label, None if failure is None else failure.message, len(failed)
                        )
                again = [job for job in todo if _worth(failed.get(job.folder))]
        finally:
            for job in todo:
                if not _at_fault(failed.get(job.folder)):
                    remove_if_never_begun(job.folder)
    return [(job, failed[job.folder]) for job in todo if job.folder in failed]


def _launched(
    launcher: Launcher, jobs: list[Job]
) -> Generator[tuple[Job, Failure | None], None, None]:
    """Each job and its outcome, as it ends.

    Raises:
        Interrupted: SIGTERM, which is passed on to the runs, or Ctrl-C, which they have as well.
    """
    try:
        with _stopped_by_sigterm(launcher), closing(launcher.launch(carry_out, jobs)) as ended:
            yield from ended
    except KeyboardInterrupt:
        raise _interrupted(signal.SIGINT) from None


def _interrupted(number: int) -> Interrupted:
    """What a signal that stops several runs is told as."""
    name = signal.Signals(number).name
    return Interrupted(
        f"stopped by {name}; runs under way have saved: start it again to go on", number
    )


def _worth(failure: Failure | None) -> bool:
    """Whether another attempt may end otherwise."""
    useless = (UserError.exit_code, Pruned.exit_code)
    return failure is not None and failure.exit_code not in useless


def _at_fault(failure: Failure | None) -> bool:
    """Whether it is a fault of the program, whose traceback is in the run's output.txt."""
    return failure is not None and failure.exit_code == DynmoeError.exit_code


def _told(failed: list[tuple[Job, Failure]]) -> DynmoeError:
    """One error for all runs that failed; several are told one by one on stderr."""
    lines = [f"{job.label}: {failure.message}" for job, failure in failed]
    codes = {failure.exit_code for _, failure in failed}
    if len(failed) == 1:
        error = DynmoeError(lines[0])
    else:
        for line, (_, failure) in zip(lines, failed, strict=True):
            print(f"failed: {line} (exit code {failure.exit_code})", file=sys.stderr)
        error = DynmoeError(
            f"{len(failed)} runs failed, as told above; the others are done: start again to go on"
        )
    error.exit_code = codes.pop() if len(codes) == 1 else DynmoeError.exit_code
    return error


def _distinct(jobs: list[Job]) -> list[Job]:
    """One job per folder."""
    by_folder: dict[Path, Job] = {}
    for job in jobs:
        other = by_folder.setdefault(job.folder, job)
        changed = difference(identity(other.config), identity(job.config))
        if changed:
            raise UserError(
                f"{other.label!r} and {job.label!r} have one folder, {job.folder}, and other "
                f"settings ({'; '.join(changed)}); give them other names"
            )
    return list(by_folder.values())


@contextmanager
def _stopped_by_sigterm(launcher: Launcher) -> Iterator[None]:
    """SIGTERM, which comes to this process alone, stops the runs and raises Interrupted."""

    def stop(number: int, frame: FrameType | None) -> None:
        launcher.stop()
        raise _interrupted(number)

    handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def carry_out(job: Job) -> Failure | None:
    """Carry a run out, wherever a launcher has put it; its output goes into the run's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "output.txt", "a") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            run_one(job.experiment, job.preset, job.config, bar=job.bar)
        except DynmoeError as error:
            return Failure(str(error), error.exit_code)
        except Exception as error:  # the other runs go on
            traceback.print_exc()
            told = as_told(error) if isinstance(error, OSError) else None
            if told is not None:
                return Failure(str(told), told.exit_code)
            what = f"{type(error).__name__}: {error}".split("\n")[0]
            return Failure(f"{what} (see {job.folder / 'output.txt'})", DynmoeError.exit_code)
    return None

"""Carries runs out: one here, or many, several processes at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from dynmoe.errors import DynmoeError, Interrupted, ResourceError, UserError
from dynmoe.lab.config import RunConfig, difference, digest, identity, parse
from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.run import Run, check_settings
from dynmoe.registry import load_own_parts


@dataclass(frozen=True)
class Done:
    """A finished run."""

    folder: Path
    """the run's"""
    summary: dict[str, Any]
    """its figures"""
    model: nn.Module | None
    """the network, if it was trained by this call"""


def run_one(experiment: Experiment, preset: str, config: Any, shared: Any = None) -> Done:
    """Carry out one run, or read what an earlier run of the same settings found.

    Args:
        experiment: what the run does.
        preset: begins the name of its folder where `config.name` is None.
        config: its settings.
        shared: what `experiment.load(config)` gives; None to load it here.

    Raises:
        DynmoeError: see `Run` and the experiment.
    """
    experiment.check(config)
    if shared is None:
        shared = experiment.load(config)
    model = None
    with Run(experiment.command, preset, config, experiment.label(config, shared)) as run:
        now = run.summary is None
        if now:
            with closing(experiment.prepare(run, config, shared)) as session:
                with session.recorder.progress:
                    if run.restored is not None:
                        session.restore(run.restored)
                    session.work()
                run.finish(session.summary())
                model = session.model
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

    @property
    def done(self) -> bool:
        """Whether its summary is there.

        Raises:
            UserError: the folder holds a run with other settings.
        """
        check_settings(self.folder, identity(self.config))
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
    argv = [*argv, "--allow-unused"]
    preset, config = parse(presets, argv, f"python -m dynmoe.{experiment.command}", "")
    config = replace(config, compare=())  # a preset's own comparisons are none of the study's
    experiment.check(config)
    config = experiment.settle(config)
    name = f"studies/{config.method.part.name}-{digest(config)}"
    own = {"name": name, "runs_dir": runs_dir, "resume": True}
    found = [replace(config, seed=seed, **own) for seed in seeds]
    return [make_job(experiment, preset, one, label, None) for one in found]


def results_of(jobs: dict[str, dict[str, list[Job]]], experiment: Experiment) -> Results:
    """Those of finished jobs: stream -> variant -> one per seed."""
    return Results(
        {s: {v: [j.summary() for j in js] for v, js in vs.items()} for s, vs in jobs.items()},
        {s: {v: [j.folder for j in js] for v, js in vs.items()} for s, vs in jobs.items()},
        experiment,
    )


def run_jobs(jobs: list[Job], processes: int, title: str) -> None:
    """Run all jobs that are not done; the first failure stops those not begun.

    Jobs of one folder and the same settings are one run.

    Args:
        processes: runs at a time.
        title: shown with the progress.

    Raises:
        UserError: jobs of one folder differ in their settings, or the folder holds others.
        DynmoeError: a run failed; its message and exit code are passed on.
        ResourceError: a process was killed.
    """
    jobs = _distinct(jobs)
    todo = [job for job in jobs if not job.done]
    if not todo:
        return
    from rich.console import Console
    from rich.progress import Progress

    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stop = context.Event()
    with (
        _sigterm_raises(),
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(processes, context, _begin_worker, (stop,)) as pool,
    ):
        bar = progress.add_task(title, total=len(jobs), completed=len(jobs) - len(todo))
        futures = {pool.submit(_run_one, job): job for job in todo}
        try:
            for future in as_completed(futures):
                job, error = futures[future], future.result()
                if error is not None:
                    failure = DynmoeError(f"{job.label}: {error[0]}")
                    failure.exit_code = error[1]
                    raise failure
                progress.update(bar, advance=1)
                if not progress.console.is_terminal:
                    print(f"{title}: {job.label} done", file=sys.stderr, flush=True)
        except (
            BaseException
        ) as reason:  # also Ctrl-C, which the runs under way get as well, and save
            stop.set()
            if isinstance(reason, Interrupted):  # SIGTERM came to this process alone
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(reason, BrokenProcessPool):
                raise ResourceError(
                    "a process with a run was killed, perhaps as memory ran out; start it again "
                    "to go on, with fewer --jobs"
                ) from None
            raise


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
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Interrupted in the block."""
    handler = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Interrupted(
        "stopped by SIGTERM; runs under way have saved: start it again to go on", number
    )


_stop: Any = None
"""In a worker: an event, set when no further run is to begin."""


def _begin_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    load_own_parts()  # a job's settings may hold some, and could not be unpickled
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone, even killed: it would go on and keep runs locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_one(job: Job) -> tuple[str, int] | None:
    """In a worker: carry the run out, its output into the run's folder.

    Returns:
        an error's text and exit code, or None.
    """
    if _stop.is_set():
        return None
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "output.txt", "a") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            run_one(job.experiment, job.preset, job.config)
        except DynmoeError as error:
            return str(error), error.exit_code
    return None

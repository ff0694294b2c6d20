"""Many runs of a command, several processes at a time: what sweeps and studies are made of."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dynmoe.errors import DynmoeError, Interrupted, ResourceError


@dataclass(frozen=True)
class Job:
    """One run of a command, in a folder of its own."""

    label: str
    """names it to the user"""
    command: str
    """`dynmoe.<command>`"""
    argv: tuple[str, ...]
    """its flags"""
    folder: Path
    """where its summary.json will be"""

    @property
    def done(self) -> bool:
        """Whether its summary is there."""
        return (self.folder / "summary.json").is_file()

    def summary(self) -> Any:
        """The summary of the finished run."""
        return json.loads((self.folder / "summary.json").read_text())


def make_job(
    command: str, name: str, flags: list[str], seed: int, runs_dir: Path, label: str
) -> Job:
    """The run of `command` with these flags and seed, in `runs_dir/command/name/seed-N`.

    It resumes what is unfinished, and compares with nothing unless the flags say so.
    """
    alone = [] if "--compare" in flags else ["--compare"]
    place = ["--name", name, "--runs-dir", str(runs_dir), "--seed", str(seed), "--resume"]
    folder = runs_dir / command / name / f"seed-{seed}"
    return Job(f"{label}, seed {seed}", command, (*flags, *alone, *place), folder)


def run_jobs(jobs: list[Job], processes: int, title: str) -> None:
    """Run all jobs that are not done; the first failure stops those not begun.

    Jobs of one folder are one run.

    Args:
        processes: runs at a time.
        title: shown with the progress.

    Raises:
        DynmoeError: a run failed; its message and exit code are passed on.
        ResourceError: a process was killed.
    """
    jobs = list({job.folder: job for job in jobs}.values())
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
                    "a process with a run was killed, perhaps for want of memory; start it again "
                    "to go on, with fewer --jobs"
                ) from None
            raise


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
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone, even killed: it would go on and keep runs locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_one(job: Job) -> tuple[str, int] | None:
    """In a worker: run the command, its output into the run's folder.

    Returns:
        an error's text and exit code, or None.
    """
    if _stop.is_set():
        return None
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "output.txt", "a") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            importlib.import_module(f"dynmoe.{job.command}").main(list(job.argv))
        except DynmoeError as error:
            return str(error), error.exit_code
        except SystemExit as exit_:  # tyro, on a bad flag
            code = int(exit_.code or 0)
            return (f"exit {code}, see {job.folder / 'output.txt'}", code) if code else None
    return None

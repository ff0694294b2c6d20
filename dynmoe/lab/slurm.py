"""A launcher on SLURM, by submitit.

A job has ended when its result is there, or when SLURM's queue no longer knows of it. `squeue`
tells that on any cluster; `sacct`, which submitit asks, only where SLURM keeps accounts.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab.launchers import KILLED, Failure, Launcher, Outcome, Work, installed
from dynmoe.registry import load_own_parts

POLL_S = 1.0
"""Seconds between two looks for results."""
QUEUE_S = 15.0
"""Seconds between two looks at SLURM's queue."""
ENDED_EARLY = 144
"""Exit code of a job that SIGTERM ended; submitit's local executor begins such a one again."""


@dataclass(frozen=True)
class Submitit(Launcher):
    """Job arrays of SLURM, by submitit. Near its time limit a job saves and is queued again."""

    jobs: int = 1
    """runs at a time"""
    cpus: int = 1
    """CPU cores of each run"""
    gpus: int = 0
    """GPUs of each run"""
    minutes: int = 1440
    """time limit of a job; a run that takes longer is queued again, and goes on"""
    partition: str | None = None
    """SLURM's; None: its default"""
    cluster: str = "slurm"
    """slurm, or local: processes of this machine, to try a sweep before it is sent off"""
    folder: Path = Path("runs/submitit")
    """submitit's own files; all machines see it"""
    under_way: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def check(self) -> None:
        """See `Launcher`."""
        installed("submitit", "slurm")
        if self.cluster == "slurm" and shutil.which("srun") is None:
            raise UserError(
                "no SLURM here: there is no srun; start from a login node, or try it with "
                "--cluster local"
            )

    def launch(self, work: Work, items: list[Any]) -> Generator[Outcome, None, None]:
        """One array; `local`, which has no queue, takes as many as run at a time."""
        import submitit

        executor = submitit.AutoExecutor(
            self.folder, self.cluster, slurm_max_num_timeout=1000, local_max_num_timeout=1000
        )
        options: dict[str, Any] = {
            "name": "dynmoe",
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus,
            "slurm_array_parallelism": self.jobs,
            "slurm_signal_delay_s": 120,
            "slurm_additional_parameters": {"requeue": True},  # by SLURM itself, if it pre-empts
        }
        if self.partition is not None:
            options["slurm_partition"] = self.partition
        executor.update_parameters(**options)
        slurm = self.cluster == "slurm"
        size = max(1, len(items)) if slurm else self.jobs
        queue = Queue()
        has_ended = queue.has_ended if slurm else _is_done
        try:
            for start in range(0, len(items), size):
                group = items[start : start + size]
                jobs = executor.submit_array([Requeued(work, pickle.dumps(i)) for i in group])
                self.under_way.extend(jobs)
                waiting = dict(zip(jobs, group, strict=True))
                while waiting:
                    for job in [job for job in waiting if has_ended(job)]:
                        self.under_way.remove(job)
                        yield waiting.pop(job), _result(job)
                    time.sleep(POLL_S if waiting else 0)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            while not all(has_ended(job) for job in self.under_way):
                time.sleep(POLL_S)
            self.under_way.clear()

    def stop(self) -> None:
        """Cancel all jobs; those that run get a signal, and save."""
        for job in self.under_way:
            job.cancel(check=False)


class Queue:
    """What SLURM has of the jobs that this process has submitted."""

    def __init__(self) -> None:
        self._asked_at = time.monotonic()
        self._answers: list[set[str]] = []  # the two latest: a result may be seen late

    def has_ended(self, job: Any) -> bool:
        """Whether a job has its result, or has left the queue without one."""
        with os.scandir(job.paths.folder):  # network file systems look again
            pass
        if job.paths.result_pickle.exists():
            return True
        if time.monotonic() - self._asked_at > QUEUE_S:
            self._asked_at = time.monotonic()
            self._answers = [*self._answers[-1:], *_queued()]
        known: set[str] = set().union(*self._answers)
        return len(self._answers) == 2 and job.job_id not in known


def _queued() -> list[set[str]]:
    """Ids of the user's jobs that wait or run, as a list of one; none: SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return [] if answer.returncode else [set(answer.stdout.split())]


def _is_done(job: Any) -> bool:
    """As submitit says, which looks after the processes of its local executor."""
    return bool(job.done())


def _result(job: Any) -> Failure | None:
    """How a job of submitit ended."""
    why = f"{KILLED}; submitit's files are {job.paths.stderr} and beside it"
    if not job.paths.result_pickle.exists():
        return Failure(why, ResourceError.exit_code)
    try:
        outcome: Failure | None = job.result()
    except Exception as error:  # submitit's own, or of a result that cannot be read
        return Failure(f"{type(error).__name__}: {why}", ResourceError.exit_code)
    return outcome


@dataclass(frozen=True)
class Requeued:
    """A piece of work as submitit calls it: told to make room, it saves and is queued again.

    SIGUSR2 (submitit's signal of a time limit that is near) and SIGUSR1 queue it here. SIGTERM
    comes of `scancel`, or of a requeue by SLURM itself: the process then ends without a result,
    and the rest is SLURM's. Or it comes as the grace time of a pre-emption begins: SLURM queues a
    job again that it has to kill in the end, not one that has saved and ended; so it is done here.
    """

    work: Work
    data: bytes
    """the item, pickled: parts of the user's own are imported before it is read"""

    def __call__(self) -> Failure | None:
        """Do the work. A run under way has its own handler of SIGTERM, which saves at a step."""
        queue_again: Any = signal.getsignal(signal.SIGUSR2)
        idle = signal.getsignal(signal.SIGTERM)
        asked: list[int] = []

        def ask(number: int, frame: FrameType | None) -> None:
            if signal.getsignal(signal.SIGTERM) is idle:  # nothing to save
                queue_again(number, frame)
            elif not asked:
                asked.append(number)
                signal.raise_signal(signal.SIGTERM)

        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, ask)
        load_own_parts()
        failure = self.work(pickle.loads(self.data))
        if failure is not None and failure.exit_code == 128 + signal.SIGTERM:
            if asked or _warned():
                queue_again(signal.SIGUSR2, None)  # ends this process
            sys.exit(ENDED_EARLY)
        return failure

    def checkpoint(self) -> Any:
        """What is queued again: the same, as the run has saved all that it needs."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _warned() -> bool:
    """Whether SLURM still calls this process's job running: it has warned, and ended nothing."""
    from submitit import JobEnvironment

    here = JobEnvironment()
    if here.cluster != "slurm":
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={here.job_id}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() == "RUNNING"

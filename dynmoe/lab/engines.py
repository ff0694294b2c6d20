"""Launchers on the engines of others: SLURM through submitit, and Ray; the options of all.

What is under way is told to stop when this process is: runs save, and go on when they are given out
again. Files are in a folder that all machines share.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab.launchers import KILLED, Failure, Launcher, Local, Outcome, Work
from dynmoe.registry import load_own_parts

POLL_S = 1.0
"""Seconds between two looks at the jobs of a cluster."""
REACH_S = 5.0
"""Seconds to wait for a cluster's address."""
ENDED_EARLY = 144
"""Exit code of a job that SIGTERM ended; submitit's local executor begins such a one again."""
STARTS = 3
"""Attempts at starting Ray here."""
STORE_BYTES = 100 * 2**20
"""Object store of a Ray that is started here: runs hand over next to nothing."""


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
        _installed("submitit", "slurm")
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
        size = len(items) if self.cluster == "slurm" else self.jobs
        try:
            for start in range(0, len(items), size):
                group = items[start : start + size]
                jobs = executor.submit_array([Requeued(work, pickle.dumps(i)) for i in group])
                self.under_way.extend(jobs)
                yield from self._ended(dict(zip(jobs, group, strict=True)))
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            while not all(job.done() for job in self.under_way):
                time.sleep(POLL_S)
            self.under_way.clear()

    def _ended(self, waiting: dict[Any, Any]) -> Iterator[Outcome]:
        """Each job's item when it has ended."""
        while waiting:
            for job in [job for job in waiting if job.done()]:
                self.under_way.remove(job)
                yield waiting.pop(job), _result(job)
            if waiting:
                time.sleep(POLL_S)

    def stop(self) -> None:
        """Cancel all jobs; those that run get a signal, and save."""
        for job in self.under_way:
            job.cancel(check=False)


def _result(job: Any) -> Failure | None:
    """How a job of submitit ended."""
    try:
        outcome: Failure | None = job.result()
    except Exception as error:  # submitit's own: it has no result
        why = f"{KILLED}; submitit's files are {job.paths.stderr} and beside it"
        return Failure(f"{type(error).__name__}: {why}", ResourceError.exit_code)
    return outcome


@dataclass(frozen=True)
class Requeued:
    """A piece of work as submitit calls it: told to make room, it saves and is queued again.

    SIGUSR2 (submitit's signal of a time limit that is near) queues it here. SIGTERM comes of a
    pre-emption, after which SLURM queues the job itself, or of `scancel`, after which it must not
    be queued: the process then ends without a result, and what follows is SLURM's to decide.
    """

    work: Work
    data: bytes
    """the item, pickled: parts of the user's own are imported before it is read"""

    def __call__(self) -> Failure | None:
        """Do the work. A run under way has its own handler of SIGTERM, which saves at a step."""
        load_own_parts()
        queue_again: Any = signal.getsignal(signal.SIGUSR2)
        idle = signal.getsignal(signal.SIGTERM)
        asked: list[int] = []

        def ask(number: int, frame: FrameType | None) -> None:
            if signal.getsignal(signal.SIGTERM) is idle:  # nothing to save
                queue_again(number, frame)
            elif not asked:
                asked.append(number)
                signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGUSR2, ask)
        failure = self.work(pickle.loads(self.data))
        if failure is not None and failure.exit_code == 128 + signal.SIGTERM:
            if asked:
                queue_again(signal.SIGUSR2, None)  # ends this process
            sys.exit(ENDED_EARLY)
        return failure

    def checkpoint(self) -> Any:
        """What is queued again: the same, as the run has saved all that it needs."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Ray(Launcher):
    """Tasks of Ray, on a cluster, or on a Ray that is started here and only reached from here."""

    jobs: int = 1
    """runs at a time"""
    cpus: int = 1
    """CPU cores of each run"""
    gpus: int = 0
    """GPUs of each run"""
    address: str | None = None
    """host:port of the cluster's head; None: start Ray here"""
    retries: int = 3
    """times that Ray gives a run to another worker when its worker died"""
    under_way: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def check(self) -> None:
        """See `Launcher`."""
        _installed("ray", "ray")
        if self.address is None:
            return
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), REACH_S).close()
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"no Ray cluster at --address {self.address} ({error}); give the host:port that "
                "`ray start --head` names, or none to start Ray here"
            ) from None

    def launch(self, work: Work, items: list[Any]) -> Generator[Outcome, None, None]:
        """No more than `jobs` tasks at a time, so that few have to be stopped."""
        import ray

        self._connect()
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries)(_do)
        waiting, busy = deque(items), dict[Any, Any]()
        try:
            while waiting or busy:
                while waiting and len(busy) < self.jobs:
                    reference = task.remote(work, pickle.dumps(waiting[0]), os.getcwd())
                    busy[reference] = waiting.popleft()
                    self.under_way.append(reference)
                for reference in ray.wait(list(busy))[0]:
                    self.under_way.remove(reference)
                    yield busy.pop(reference), _got(reference)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            if self.under_way:
                ray.wait(self.under_way, num_returns=len(self.under_way))
            self.under_way.clear()
            ray.shutdown()

    def stop(self) -> None:
        """Cancel all tasks; each run gets an interrupt, and saves."""
        import ray

        for reference in self.under_way:
            ray.cancel(reference)

    def _connect(self) -> None:
        """Join the cluster, or start one without dashboard and statistics of use.

        Raises:
            UserError: it does not take us in.
            ResourceError: Ray does not start here.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if self.address is not None:
            try:
                ray.init(self.address, **quiet)
            except Exception as error:
                reason = str(error).split("\n")[0]
                raise UserError(f"no Ray cluster at --address {self.address} ({reason})") from None
            return
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # workers inherit it
        for left in reversed(range(STARTS)):  # Ray gives itself 30 s: little where much else runs
            try:
                ray.init(
                    "local", num_cpus=self.jobs * self.cpus, include_dashboard=False,
                    object_store_memory=STORE_BYTES, _node_ip_address="127.0.0.1", **quiet,
                )  # fmt: skip
                return
            except Exception as error:
                ray.shutdown()
                if not left:
                    reason = str(error).strip().split("\n")[0]
                    raise ResourceError(
                        f"Ray does not start here ({reason}); start again when the machine is less "
                        "busy, or use --launcher local"
                    ) from None


def _do(work: Work, data: bytes, folder: str) -> Failure | None:
    """On a worker of Ray: the work, in the folder that relative paths are meant from."""
    os.chdir(folder)
    load_own_parts()
    return work(pickle.loads(data))


def _got(reference: Any) -> Failure | None:
    """How a task of Ray ended."""
    import ray

    try:
        outcome: Failure | None = ray.get(reference)
    except Exception as error:  # the worker died too often, or the task could not begin
        reason = str(error).strip().split("\n")[-1]
        return Failure(f"{KILLED} ({type(error).__name__}: {reason})", ResourceError.exit_code)
    return outcome


def _installed(package: str, extra: str) -> None:
    """Refuse an engine that is not there.

    Raises:
        UserError: it is not installed; the line names the extra that brings it.
    """
    if find_spec(package) is None:
        raise UserError(
            f"this launcher needs {package}, not installed here; run: pip install 'dynmoe[{extra}]'"
        )


LAUNCHERS: dict[str, type[Launcher]] = {"local": Local, "submitit": Submitit, "ray": Ray}


@dataclass(frozen=True, kw_only=True)
class Where:
    """Options of the launchers; None leaves a launcher's own default."""

    launcher: Literal["local", "submitit", "ray"] = "local"
    """where runs are carried out: processes of this machine, SLURM by submitit, or Ray"""
    jobs: int = os.cpu_count() or 1
    """runs at a time"""
    cpus: int | None = None
    """submitit and ray: CPU cores of each run (1)"""
    gpus: int | None = None
    """submitit and ray: GPUs of each run (0)"""
    minutes: int | None = None
    """submitit: time limit of a job (1440); a run that takes longer is queued again and goes on"""
    partition: str | None = None
    """submitit: SLURM's partition"""
    cluster: Literal["slurm", "local"] | None = None
    """submitit: local tries it out with processes of this machine"""
    address: str | None = None
    """ray: host:port of the cluster's head; none: start Ray here"""

    def make(self, runs_dir: Path) -> Launcher:
        """The launcher that these options choose.

        Raises:
            UserError: an option that it does not have or that cannot work.
        """
        kind = LAUNCHERS[self.launcher]
        known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        given: dict[str, Any] = {}
        for option in dataclasses.fields(Where):
            value = getattr(self, option.name)
            if option.name == "launcher" or value is None:
                continue
            if option.name not in known:
                owners = [n for n, k in LAUNCHERS.items() if option.name in k.__dataclass_fields__]  # type: ignore[attr-defined]
                raise UserError(
                    f"--{option.name} has no effect with --launcher {self.launcher}; it is for "
                    f"--launcher {' or '.join(owners)}"
                )
            least = 0 if option.name == "gpus" else 1
            if isinstance(value, int) and value < least:
                raise UserError(f"--{option.name} {value} is too small; use {least} or more")
            given[option.name] = value
        if kind is Submitit:
            given["folder"] = runs_dir / "submitit"
        return kind(**given)

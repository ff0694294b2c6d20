"""A launcher on Ray, and the options of all launchers; that of SLURM is in `slurm.py`.

What is under way is told to stop when this process is: runs save, and go on when they are given out
again. Files are in a folder that all machines share.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import sys
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab.launchers import KILLED, Failure, Launcher, Local, Outcome, Work, installed
from dynmoe.lab.slurm import Submitit
from dynmoe.registry import load_own_parts

REACH_S = 5.0
"""Seconds to wait for a cluster's address."""
LEAST = {"gpus": 0, "minutes": 4}
"""Smallest values of options, else 1: a job is warned two minutes before its limit, and SLURM may
do that a minute earlier still."""
STARTS = 3
"""Attempts at starting Ray here."""
STORE_BYTES = 100 * 2**20
"""Object store of a Ray that is started here: runs hand over next to nothing."""


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
        installed("ray", "ray")
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
    """submitit: time limit of a job (1440), 4 at least; a run that takes longer is queued again and
    goes on"""
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
            least = LEAST.get(option.name, 1)
            if isinstance(value, int) and value < least:
                raise UserError(f"--{option.name} {value} is too small; use {least} or more")
            given[option.name] = value
        if kind is Submitit:
            given["folder"] = runs_dir / "submitit"
        return kind(**given)

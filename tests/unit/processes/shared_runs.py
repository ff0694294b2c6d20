"""What each of two processes that share a run does in the tests, and what one does alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.errors import Interrupted, UserError
from dynmoe.lab import processes
from dynmoe.lab.experiment import Session
from dynmoe.lab.run import Run
from dynmoe.registry import get

Work = Callable[[Path], Any]


def as_torchrun(rank: int, size: int, port: int) -> None:
    """The variables that torchrun gives a process; loopback only."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def work(rank: int, size: int, port: int, folder: str) -> None:
    """All checks in turn on one of several processes; what each finds is kept."""
    from cl_benchmarks.preparing import load_trainer

    torch.set_num_threads(1)
    load_trainer()
    as_torchrun(rank, size, port)
    processes.join("cpu")
    for check in CHECKS:
        torch.save(check(Path(folder)), f"{folder}/{check.__name__}-{rank}.pt")


def cl_config(folder: Path, **changes: Any) -> Any:
    """A stream of two tasks with a growth between them, of batches of 9, 9, 9 and 1 image."""
    from dynmoe.cl import presets

    config = replace(
        presets()["smoke"],
        runs_dir=folder / f"runs-{processes.rank()}",
        device="cpu",
        compare=(),
        chunks=2,
        epochs=2,
        batch_size=9,
        protocol=get("protocol", "shuffle").Config(images=28),
        router=get("router", "topk").Config(),
        balance=get("loss", "switch").Config(weight=0.1),
        pruning=get("pruning", "utility").Config(),
        augment="crop-flip",
        clip=0.5,
    )
    return replace(config, **changes)


def in_float64(session: Session) -> None:
    """Let the network of a session that has not begun work in double precision."""
    assert session.model is not None
    session.model.double()
    session.model.register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))


def train(config: Any, stop_at: int = -1) -> dict[str, Any]:
    """A run of cl in double precision: its weights and its summary.

    Args:
        stop_at: the step in which the last process gets SIGTERM.
    """
    from cl_benchmarks.experiment import ContinualLearning

    experiment = ContinualLearning()
    shared = experiment.load(config)
    with Run("cl", "smoke", config) as run, closing(experiment.prepare(run, config, shared)) as one:
        in_float64(one)
        one.trainer.plugins.append(Stop(stop_at))
        if run.restored is not None:
            one.restore(run.restored)
        one.work()
        run.finish(one.summary())
        return {"weights": weights(one), "summary": one.summary()}


class Stop:
    """Avalanche plugin that sends SIGTERM to the last process in a given step."""

    supports_distributed = True

    def __init__(self, step: int) -> None:
        self.step = step

    def after_update(self, strategy: Any, **_: Any) -> None:
        last = processes.rank() == processes.size() - 1
        if last and strategy.clock.train_iterations == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trains_cl(folder: Path) -> dict[str, Any]:
    """What two tasks and a growth end with."""
    return train(cl_config(folder, name="whole"))


def resumes_cl(folder: Path) -> dict[str, Any]:
    """The same, stopped in the midst of the second task and resumed from its checkpoint."""
    config = cl_config(folder, name="stopped", resume=True)
    try:
        train(config, stop_at=11)
        return {"stopped": False}
    except Interrupted as error:
        return {"stopped": str(error).split(";")[0], **train(config)}


def refuses_cl(folder: Path) -> list[str]:
    """Why settings that processes would part over cannot be shared."""
    reasons = []
    for changes in (
        {"router": get("router", "expert-choice").Config()},
        {"intervention": get("intervention", "redo").Config()},
        {"batch_size": 1},
    ):
        try:
            train(cl_config(folder, name=f"refused-{len(reasons)}", **changes))
        except UserError as error:
            reasons.append(str(error))
    return reasons


def loses_one(folder: Path) -> bool:
    """The last check: one process ends, and what the other then sees is known for that."""
    if processes.rank() == 1:
        os._exit(0)
    try:
        for _ in range(100):
            dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return processes.lost(error)
    return False


def weights(session: Session) -> dict[str, Tensor]:
    assert session.model is not None
    return {name: value.clone() for name, value in session.model.state_dict().items()}


CHECKS: tuple[Work, ...] = (trains_cl, resumes_cl, refuses_cl, loses_one)

"""What each of two processes that share a run does in the tests, and what one does alone.

Runs of rl are in shared_play.py.
"""

from __future__ import annotations

import importlib
import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_benchmarks.shared_norm import share_batch_norms
from dynmoe.errors import Interrupted, UserError
from dynmoe.lab import checkpoint, processes
from dynmoe.lab.experiment import Session
from dynmoe.lab.run import Run
from dynmoe.moe import MoELayer
from dynmoe.moe.passes import share_batch
from dynmoe.registry import get


def as_torchrun(rank: int, size: int, port: int) -> None:
    """The variables that torchrun gives a process; loopback only."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def work(rank: int, size: int, port: int, folder: str, checks: list[tuple[str, str]]) -> None:
    """Checks, (module, function), in turn on one of several processes; what each finds is kept."""
    torch.set_num_threads(1)
    if any(name == "trains_cl" for _, name in checks):  # Avalanche must come before all are joined
        from cl_benchmarks.preparing import load_trainer

        load_trainer()
    as_torchrun(rank, size, port)
    processes.join("cpu")
    for module, name in checks:
        check = getattr(importlib.import_module(module), name)
        torch.save(check(Path(folder)), f"{folder}/{name}-{rank}.pt")
    os._exit(0)  # the group cannot be left in order where one has gone


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
    for module in session.model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | MoELayer):
            module.register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))


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


def train_dg(folder: Path, name: str, stop_at: int = -1) -> dict[str, Any]:
    """A run of dg in double precision, of MoE² with a growth, leaving out two domains in turn.

    Args:
        stop_at: the step with the second domain left out before which the last process gets
            SIGTERM.

    Returns:
        the summary, and what was learnt, which the first process alone has kept.
    """
    from dynmoe.dg.__main__ import presets
    from dynmoe.experiments.dg.experiment import DomainGeneralisation
    from dynmoe.experiments.dg.fold import Fold

    config = replace(
        presets()["smoke"], runs_dir=folder / f"runs-{processes.rank()}", device="cpu", name=name,
        compare=(), steps=4, eval_every=2, batch_size=4, eval_batch=16, features=2, resume=True,
        test_domains=("plain", "edges"), granularity=1, keep_model=True,
        method=get("dg", "moe2").Config(experts=2, max_experts=3, prototypes="kmeans"),
        trigger=get("trigger", "every").Config(steps=2),
    )  # fmt: skip
    experiment, step = DomainGeneralisation(), Fold._train_step
    shared = experiment.load(config)
    shared.backbone.double()

    def signalled(fold: Fold) -> float:
        last = processes.rank() == processes.size() - 1
        if last and (fold.place, fold.step) == (1, stop_at):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(fold)

    torch.set_default_dtype(torch.double)
    try:
        with (
            patch.object(Fold, "_train_step", signalled),
            Run("dg", "smoke", config) as run,
            closing(experiment.prepare(run, config, shared)) as trial,
        ):
            if run.restored is not None:
                trial.restore(run.restored)
            trial.work()
            run.finish(trial.summary())
    finally:
        torch.set_default_dtype(torch.float32)
    kept = [checkpoint.load_latest(run.folder / "models" / str(test)) for test in shared.tests]
    return {"summary": trial.summary(), "weights": [one and one["state"] for one in kept]}


def trains_dg(folder: Path) -> dict[str, Any]:
    """What both domains' networks end with."""
    return train_dg(folder, "whole")


def resumes_dg(folder: Path) -> dict[str, Any]:
    """The same, stopped with the second domain left out and resumed from its checkpoint."""
    try:
        train_dg(folder, "stopped", stop_at=2)
        return {"stopped": False}
    except Interrupted as error:
        return {"stopped": str(error).split(";")[0], **train_dg(folder, "stopped")}


def learns_dg(folder: Path) -> dict[str, Any]:
    """Methods of dg that look at a batch as a whole, after steps on batches that are shared."""
    from dg_learning import learn

    share_batch()
    return {name: learn(name) for name in ("moe2", "becotta", "gmoe", "meta-dmoe")}


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


def shares_batch_norm(folder: Path) -> dict[str, Tensor]:
    """A network with BatchNorm, channels last, after steps on batches of 5 and of 1 image."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    model.to(memory_format=torch.channels_last)
    if processes.joined():
        share_batch_norms(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, eps=1e-3, fused=True)
    share_batch()
    for count in (5, 1, 4):
        images = processes.own_rows(torch.randn(count, 3, 6, 6, dtype=torch.double))
        optimizer.zero_grad()
        (model(images).square().sum() * processes.size() / count).backward()
        processes.average_gradients(model.parameters(), torch.zeros(1))
        optimizer.step()
    output = model.eval()(torch.ones(1, 3, 6, 6).double()).detach()
    return {"output": output, **model.state_dict()}


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

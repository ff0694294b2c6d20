"""What the tests of expanding methods and of replay share: small runs and small networks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.method import Training
from cl_benchmarks.settings import Config
from dynmoe import cl
from dynmoe.interventions.intervention import Intervention, NoIntervention
from dynmoe.registry import get


def config(runs: Path, **changes: Any) -> Config:
    """Digits in tasks of two classes, 24 hidden units; parts as names or (name, options)."""
    parts = {"method": ("dense", {}), "intervention": ("none", {}), "protocol": ("class", {})}
    for kind in parts:
        if kind in changes:
            chosen = changes.pop(kind)
            parts[kind] = chosen if isinstance(chosen, tuple) else (chosen, {})
    built = {kind: get(kind, name).Config(**options) for kind, (name, options) in parts.items()}
    network = get("network", "mlp").Config(width=16, hidden=24)
    small = replace(
        cl.presets()["smoke"], runs_dir=runs, compare=(), chunks=5, epochs=2, eval_samples=60,
        probe_samples=40, network=network, **built,
    )  # fmt: skip
    return replace(small, **changes)


def training_of(
    block: nn.Module, optimizer: str = "adam", intervention: Intervention | None = None
) -> Training:
    """A block of width 6 under a classifier of 3 outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(block, nn.Linear(6, 3))
    made: torch.optim.Optimizer
    if optimizer == "adam":
        made = torch.optim.Adam(model.parameters(), 0.01)
    else:
        made = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    intervention = intervention or NoIntervention.Config().build()
    return Training(
        model, made, torch.Generator().manual_seed(5), lambda draw: nn.Identity(), intervention
    )


def batch(number: int) -> tuple[Tensor, Tensor]:
    """[20, 6] and [20]; the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(20, 6, generator=generator)
    return x, torch.randint(3, (20,), generator=generator)


def train(training: Training, numbers: range) -> None:
    """Optimizer steps on these batches."""
    for number in numbers:
        x, y = batch(number)
        training.optimizer.zero_grad()
        nn.functional.cross_entropy(training.model(x), y).backward()
        training.optimizer.step()


def at_task(training: Training, task: int) -> Any:
    """What a plugin sees of an Avalanche strategy as a task starts."""
    clock = SimpleNamespace(train_exp_counter=task)
    return SimpleNamespace(clock=clock, model=training.model, optimizer=training.optimizer)


def quietly_import_avalanche() -> None:
    """It warns of optional solvers and loggers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import avalanche.training.plugins  # noqa: F401

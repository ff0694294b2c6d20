"""From settings to what is trained: network, optimizer, intervention, trainer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.method import DynamicMoE, Horizon, Method, StaticMoE, Training
from cl_benchmarks.networks import Network, build_network, check_bank
from cl_benchmarks.recorder import TaskRecorder
from cl_benchmarks.settings import Config
from cl_benchmarks.shared_norm import share_batch_norms
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab import processes
from dynmoe.moe import moe_layers

if TYPE_CHECKING:
    from cl_benchmarks.trainer import StreamTrainer


class HasShape(Protocol):
    """What a network must know of its data: an `ImageData` is one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""


def check_batches(config: Config, model: nn.Module, sizes: list[int]) -> None:
    """Refuse batches of one image, be it the last of a task, where a network has BatchNorm.

    Raises:
        UserError: names the task and a batch size that works.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return

    def single(size: int) -> list[int]:
        return [task for task, n in enumerate(sizes, start=1) if size == 1 or n % size == 1]

    tasks = single(config.batch_size)
    if tasks:
        others = [s for s in range(config.batch_size + 1, max(sizes) + 2) if not single(s)]
        hint = f"; {others[0]} works" if others else ""
        raise UserError(
            f"{config.network.part.name} has BatchNorm, which normalises by the batch and needs at "
            f"least 2 images, and a batch of task {tasks[0]} ({sizes[tasks[0] - 1]} images) has 1; "
            f"use another --batch-size (now {config.batch_size}{hint}), or a network "
            "without BatchNorm"
        )


def check_acts(config: Config, horizon: Horizon, compared: bool = False) -> None:
    """Refuse an intervention that would do nothing within the run.

    Args:
        config: the run's.
        horizon: its length.
        compared: it is one of `--compare`, whose options are the defaults.

    Raises:
        UserError: names the option.
    """
    name = config.intervention.part.name
    reason = config.intervention.build().too_late(horizon.tasks, horizon.steps)
    if reason is None:
        return
    own = f" (--compare has its defaults; use --intervention {name} itself)" if compared else ""
    raise UserError(f"intervention {name} would do nothing: {reason}{own}")


def check_shared(config: Config, model: nn.Module) -> None:
    """Refuse what several processes that share a run would do otherwise than one.

    Raises:
        UserError: names the setting and what works.
    """
    if not processes.joined():
        return
    count, intervention = processes.size(), config.intervention.part
    reason = None
    if config.protocol.build().in_time_order:
        reason = f"--protocol {config.protocol.part.name} brings row after row"
    elif config.batch_size < count:
        reason = f"--batch-size {config.batch_size} is less than a row for each"
    elif intervention.by_batch:  # type: ignore[attr-defined]
        reason = f"--intervention {intervention.name} looks at whole batches"
    elif any(layer.router.competing for _, layer in moe_layers(model)):
        reason = f"--router {config.router.part.name} lets the images of a batch compete"
    if reason is not None:
        raise UserError(
            f"{count} processes cannot share this run: {reason}; use one process, or another choice"
        )


def prepare(
    config: Config, data: HasShape, outputs: int, horizon: Horizon, device: torch.device
) -> Training:
    """Network and optimizer. Network `draw` is the same in every run of this seed."""
    method: Method = config.method.build()
    if isinstance(method, StaticMoE | DynamicMoE):
        check_bank(config.network, config.bank)
    intervention: Intervention = config.intervention.build()

    def new_model(draw: int) -> Network:
        make = method.make_block(config, horizon, seeding.derive(config.seed, "moe", draw))
        with seeding.seeded(config.seed, "network", draw):
            network = build_network(config.network, data.shape, outputs, make)
        if processes.joined():
            share_batch_norms(network)
        config.join_routers(network)
        intervention.transform(network, seeding.generator(config.seed, "transform", draw))
        return network

    model = new_model(0).to(device)
    if config.channels_last:  # convolutions take the order of their weights for their images, too
        model = model.to(memory_format=torch.channels_last)
    generator = seeding.generator(config.seed, "method")
    return Training(model, _optimizer(config, model), generator, new_model, intervention)


def attach_intervention(config: Config, training: Training, growth: GrowthPlugin | None) -> Any:
    """The intervention of the settings at work on a network, as an Avalanche plugin."""
    intervention = training.intervention
    intervention.attach(
        training.model, training.optimizer, seeding.generator(config.seed, "strategy")
    )
    if growth is not None:
        growth.controller.listeners.append(intervention.grown)
    return intervention.plugin()


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), config.lr, weight_decay=config.weight_decay)


def load_trainer() -> type[StreamTrainer]:
    """The trainer's class, and with it Avalanche, which takes seconds.

    Processes that will share a run must load it before they are joined: Avalanche would refuse to
    make its loggers, which it does as it is imported, in any but the first.
    """
    with warnings.catch_warnings(), seeding.kept():  # of optional solvers
        warnings.simplefilter("ignore")
        from cl_benchmarks.trainer import StreamTrainer

    return StreamTrainer


def make_trainer(
    config: Config,
    training: Training,
    plugins: list[Any],
    recorder: TaskRecorder,
    device: torch.device,
) -> StreamTrainer:
    """Avalanche's trainer over all that."""
    kind = load_trainer()
    with warnings.catch_warnings():  # of loggers that we do not want
        warnings.simplefilter("ignore")
        return kind(
            model=training.model,
            optimizer=training.optimizer,
            plugins=plugins,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            device=device,
            augment=config.augment,
            clip=config.clip,
            reset_optimizer=config.reset_optimizer,
            loss_over=config.loss_over,
            precision=torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
            observer=recorder,
        )

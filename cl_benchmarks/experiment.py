"""One continual-learning experiment: a method, and those it is compared with, on one stream."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.images import ImageData
from cl_benchmarks.method import Horizon, Method, Training
from cl_benchmarks.networks import Network, build_network
from cl_benchmarks.recorder import Recorder
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import chunk_datasets, make_benchmark
from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab.figures import plasticity_figure
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.results import Result, read_run
from dynmoe.lab.run import Run
from dynmoe.lab.tables import print_methods, print_tasks
from dynmoe.plasticity.tasks import plasticity_summary

if TYPE_CHECKING:
    from cl_benchmarks.trainer import StreamTrainer

DATA_SEED = 0
"""Embedded images are one fixed data set, as a downloaded one is; a run's seed deals them out."""
LEAST = {"epochs": 1, "batch_size": 1, "probe_samples": 1, "eval_samples": 0, "threads": 0, "lr": 0,
         "momentum": 0, "weight_decay": 0, "clip": 0}  # fmt: skip
"""Setting -> the smallest value that can work. Parts check their own options."""


def run_all(preset: str, config: Config) -> Result:
    """Run `config.method`, then each of `config.compare`; print a table and draw one figure."""
    _check(config)
    configs = [config] + [_compared(config, name) for name in _others(config)]
    data = config.dataset.build().load(DATA_SEED)
    summaries: dict[str, dict[str, Any]] = {}
    folders: list[Path] = []
    model = None
    for one in configs:
        folder, summaries[one.variant], trained = _run_one(preset, one, data)
        folders.append(folder)
        model = trained if one is config else model
    main_folder = folders[0]
    if len(summaries) > 1:
        curves = {name: summary["tasks"] for name, summary in summaries.items()}
        plasticity_figure(main_folder / "comparison.png", curves, _title(config, data))
        print_methods(summaries, _title(config, data))
    print(f"results: {main_folder}")
    return Result(main_folder, tuple(map(read_run, folders)), model)


def run_method(preset: str, config: Config, data: ImageData) -> tuple[Path, dict[str, Any]]:
    """Train one method on the stream, or read what an earlier run of the same settings found.

    Returns:
        the run's folder and its summary.
    """
    return _run_one(preset, config, data)[:2]


def _run_one(
    preset: str, config: Config, data: ImageData
) -> tuple[Path, dict[str, Any], nn.Module | None]:
    """As `run_method`, and the network if it is trained now."""
    model = None
    with Run("cl", preset, config, label=f"{config.variant}-{data.name}") as run:
        method, summary = config.variant, run.summary
        known = (summary or run.restored or {}).get("dataset", data.name)
        if known != data.name:  # `auto` may find another data set than it did before
            raise UserError(
                f"{run.folder} holds a run on {known}, and now the data set is {data.name}; use "
                "another --name"
            )
        if summary is None:
            summary, model = _train(run, config, data)
            run.finish(summary)
            print_tasks(summary, f"{method}: {_title(config, data)}")
        curves = {method: summary["tasks"]}
        plasticity_figure(run.folder / "plasticity.png", curves, _title(config, data))
        return run.folder, summary, model


def _train(run: Run, config: Config, data: ImageData) -> tuple[dict[str, Any], nn.Module]:
    """All tasks, from the start or from the run's checkpoint; the summary and the network."""
    protocol = config.protocol.build()
    chunks = protocol.stream(data, config.chunks, config.access, config.seed)
    train, test = chunk_datasets(data, chunks)
    steps = sum(-(-len(chunk) // config.batch_size) * config.epochs for chunk in train)
    outputs = protocol.num_outputs(data, config.chunks)
    training = prepare(config, data, outputs, Horizon(steps, len(chunks)), run.device)
    _check_batches(config, training.model, [len(chunk) for chunk in train])
    plugins = config.method.build().plugins(config, training)
    growth = next((p for p in plugins if isinstance(p, GrowthPlugin)), None)
    plugins.append(attach_intervention(config, training, growth))
    with ProgressLine(config.variant, steps) as progress:
        recorder = Recorder(run, config, data.name, train, test, training.model, growth, progress)
        trainer = make_trainer(config, training, plugins, recorder, run.device)
        if run.restored is not None:
            recorder.load_state_dict(run.restored["recorder"])
            trainer.resume(run.restored["trainer"])
            progress.start_at(run.restored["trainer"]["clock"]["train_iterations"])
        for experience in list(make_benchmark(data, chunks).train_stream)[trainer.position.task :]:
            trainer.train(experience, eval_streams=[])
    return _summary(config, data, recorder), training.model


def _check_batches(config: Config, model: nn.Module, sizes: list[int]) -> None:
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


def prepare(
    config: Config, data: ImageData, outputs: int, horizon: Horizon, device: torch.device
) -> Training:
    """Network and optimizer. Network `draw` is the same in every run of this seed."""
    method: Method = config.method.build()
    intervention: Intervention = config.intervention.build()

    def new_model(draw: int) -> Network:
        make = method.make_block(config, horizon, seeding.derive(config.seed, "moe", draw))
        with seeding.seeded(config.seed, "network", draw):
            network = build_network(config.network, data.shape, outputs, make)
        config.join_routers(network)
        intervention.transform(network, seeding.generator(config.seed, "transform", draw))
        return network

    model = new_model(0).to(device)
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


def make_trainer(
    config: Config,
    training: Training,
    plugins: list[Any],
    recorder: Recorder,
    device: torch.device,
) -> StreamTrainer:
    """Avalanche's trainer over all that."""
    with warnings.catch_warnings():  # of optional solvers, and of loggers that we do not want
        warnings.simplefilter("ignore")
        with seeding.kept():
            from cl_benchmarks.trainer import StreamTrainer

        return StreamTrainer(
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
            observer=recorder,
        )


def _summary(config: Config, data: ImageData, recorder: Recorder) -> dict[str, Any]:
    """What summary.json holds: final figures, nothing that changes from run to run."""
    rows = [asdict(row) for row in recorder.rows]
    growth = recorder.growth
    return {
        "method": config.variant,
        "dataset": data.name,
        "protocol": config.protocol.part.name,
        "access": config.access,
        "seed": config.seed,
        "tasks": rows,
        "plasticity": {
            key: plasticity_summary([row[key] for row in rows])
            for key in ("train_accuracy", "test_accuracy", "online_accuracy")
        },
        "growth": [asdict(event) for event in growth.controller.events] if growth else [],
    }


def _check(config: Config) -> None:
    """Refuse numbers that cannot work before any work is done."""
    for name, least in LEAST.items():
        value = getattr(config, name)
        if not value >= least:  # also refuses nan
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value} is too small; use {least} or more")


def _others(config: Config) -> list[str]:
    """Methods to compare with. Those by default leave out the method itself."""
    own = config.variant if config.compare == type(config).compare else None
    return [name for name in config.compare if name != own]


def _compared(config: Config, name: str) -> Config:
    """The same settings with another method, or the dense network with an intervention."""
    if name == config.variant:
        raise UserError(f"--compare {name}: that is the main run itself; name others")
    own_name = f"{config.name}-{name}" if config.name else None
    method, intervention = "dense", name
    if name not in registry.names("intervention"):
        method, intervention = name, "none"
    return replace(
        config,
        method=registry.get("method", method).Config(),
        intervention=registry.get("intervention", intervention).Config(),
        name=own_name,
    )


def _title(config: Config, data: ImageData) -> str:
    access = "" if config.access == "limited" else f", {config.access}"
    return f"{data.name}, {config.protocol.part.name} stream{access}, {config.network.part.name}"

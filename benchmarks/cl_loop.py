"""Training speed of `dynmoe.cl` against a bare PyTorch loop over the same network and images.

    python -m benchmarks.cl_loop [--network cnn] [--threads 1] [--device cpu]

Both train networks of the same make on the same images, one task of a few epochs at a time and in
turn. "steps" is
the command's training loop: Avalanche's trainer and hooks, the growth plugin and the recorder's
online accuracy. "all" adds the metrics that the command measures at each epoch's and task's end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import alternate, ratio
from cl_benchmarks.experiment import DATA_SEED, make_trainer, prepare
from cl_benchmarks.images import ImageData
from cl_benchmarks.method import Horizon, Training
from cl_benchmarks.protocol import Chunk
from cl_benchmarks.recorder import TaskRecorder
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import ChunkDataset, chunk_datasets, make_benchmark, standardise
from dynmoe import registry
from dynmoe.cl import presets
from dynmoe.lab.run import Run


def bare_task(training: Training, chunk: ChunkDataset, config: Config) -> None:
    """The loop that one would write by hand."""
    model, optimizer = training.model, training.optimizer
    device = next(model.parameters()).device
    images, labels = (t.to(device) for t in chunk.tensors())
    mean, std = chunk.mean.to(device), chunk.std.to(device)
    for _ in range(config.epochs):
        for part in torch.randperm(len(labels)).to(device).split(config.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(standardise(images[part], mean, std)), labels[part])
            loss.backward()
            optimizer.step()


class StepsOnly:
    """An observer that leaves out what happens once per epoch and task."""

    def __init__(self, recorder: TaskRecorder) -> None:
        self.batch_done = recorder.batch_done

    def epoch_done(self, trainer: object) -> None:
        """Nothing."""

    def task_done(self, trainer: object) -> None:
        """Nothing."""


def command_task(
    config: Config, data: ImageData, chunks: list[Chunk], run: Run, whole: bool
) -> Callable[[], None]:
    """A call that trains one task the command's way."""
    training = prepare(config, data, 20, Horizon(10, len(chunks)), run.device)
    plugins = config.method.build().plugins(config, training)
    train, test = chunk_datasets(data, chunks)
    recorder = TaskRecorder(run, config, 10**9, dict, train, test, training.model, plugins[0])
    trainer = make_trainer(config, training, plugins, recorder, run.device)
    if not whole:
        trainer.observer = StepsOnly(recorder)
    experience = make_benchmark(data, chunks).train_stream[0]

    def task() -> None:
        trainer.clock.train_exp_counter = 0
        recorder.rows.clear()
        recorder.gates.clear()
        trainer.train(experience, eval_streams=[])

    return task


def main() -> None:
    """Time all three and print images per second and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="cnn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    network = registry.get("network", args.network).Config()
    config = replace(presets()["laptop"], network=network, epochs=args.epochs, threads=args.threads)
    data = registry.get("dataset", "fractal").Config().build().load(DATA_SEED)
    chunks = config.protocol.build().stream(data, config.chunks, config.access, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, runs_dir=Path(folder), device=args.device)
        with Run("cl", "benchmark", config) as run:
            training = prepare(config, data, 20, Horizon(10, len(chunks)), run.device)
            train, _ = chunk_datasets(data, chunks)
            calls = {
                "bare": lambda: bare_task(training, train[0], config),
                "steps": command_task(config, data, chunks, run, whole=False),
                "all": command_task(config, data, chunks, run, whole=True),
            }
            seconds = alternate(calls, args.rounds, run.device)
    print(f"{args.network}, batch {config.batch_size}, {args.device}, {args.threads} threads")
    for name, times in seconds.items():
        rate = config.epochs * len(train[0]) / statistics.median(times)
        print(f"{name:>6}: {rate:8.0f} images/s, {1 / ratio(seconds, name, 'bare'):.2f} x bare")


if __name__ == "__main__":
    main()

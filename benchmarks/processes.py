"""Training steps of `dynmoe.cl` on several processes against one, on the same batches.

    python -m benchmarks.processes [--size 2] [--batch-size 256] [--channels 32] [--rounds 9]

The network of preset `tiny` on random images of Tiny ImageNet's shape, one thread per process. In
turn, process 0 takes some steps on whole batches while the others wait, and all take them together,
each on its rows, with their gradients averaged as in a run. Told are both times of the clock on the
wall, their ratio, and the same of processor time, of which other programs take nothing: what one
process needs over what all together need for the same steps. On a machine with a free core for each
process, P times the latter is about the throughput.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from dataclasses import replace

import torch
import torch.multiprocessing as mp

from cl_benchmarks.method import Horizon
from cl_benchmarks.preparing import prepare
from cl_benchmarks.stream import standardise
from dynmoe import registry
from dynmoe.cl import presets
from dynmoe.lab import processes
from dynmoe.moe import collect_aux_losses, finish_step
from dynmoe.moe.passes import share_batch

STEPS, CLASSES = 5, 200
"""Steps of a turn; classes of the data set."""


class Images:
    """What a network has to know of its data."""

    shape = (3, 64, 64)


class Steps:
    """One process's network, and steps of it on whole batches or on its rows of them."""

    def __init__(self, channels: int, batch: int) -> None:
        network = registry.get("network", "cnn").Config(channels=channels)
        config = replace(presets()["tiny"], network=network, device="cpu")
        self.training = prepare(config, Images(), CLASSES, Horizon(1000, 2), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        shape = (batch, *Images.shape)
        self.images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(CLASSES, (batch,), generator=generator)
        self.mean = self.std = torch.full((3,), 0.5)

    def take(self, together: bool) -> None:
        """`STEPS` training steps."""
        model, optimizer = self.training.model, self.training.optimizer
        share_batch(together)
        images = processes.own_rows(self.images) if together else self.images
        labels = processes.own_rows(self.labels) if together else self.labels
        share = processes.own_share(len(labels), len(self.labels)) if together else 1.0
        for _ in range(STEPS):
            optimizer.zero_grad()
            logits = model(standardise(images, self.mean, self.std))
            loss = share * torch.nn.functional.cross_entropy(logits, labels)
            loss = loss + sum(collect_aux_losses(model).values())
            loss.backward()
            if together:
                processes.average_gradients(model.parameters(), loss.detach().reshape(1))
            optimizer.step()
            if together:
                finish_step(model)


def work(rank: int, size: int, port: int, args: argparse.Namespace) -> None:
    """All turns on one process; rank 0 prints."""
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "bench", "RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    steps = Steps(args.channels, args.batch_size)
    processes.join("cpu")
    wall: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    for turn in range(args.rounds + 1):
        alone, together = (_timed(steps, mode, rank) for mode in (False, True))
        if turn:  # the first is for warming up
            wall.append((alone[0], together[0]))
            cpu.append((alone[1], together[1]))
    if rank == 0:
        _tell(size, args, steps, wall, cpu)


def _timed(steps: Steps, together: bool, rank: int) -> tuple[float, float]:
    """Seconds on the wall, and of processor time over all processes, of a turn."""
    processes.summed(torch.zeros(1))
    began, used = time.perf_counter(), time.process_time()
    if together or rank == 0:
        steps.take(together)
    mine = time.process_time() - used
    passed = time.perf_counter() - began
    return passed, float(processes.summed(torch.tensor(mine, dtype=torch.double)))


def _tell(
    size: int,
    args: argparse.Namespace,
    steps: Steps,
    wall: list[tuple[float, float]],
    cpu: list[tuple[float, float]],
) -> None:
    """Print rates and ratios with their quartiles."""
    count = sum(p.numel() for p in steps.training.model.parameters())
    images = STEPS * args.batch_size
    busy = os.getloadavg()[0]
    print(f"{size} processes, batch {args.batch_size}, {count:,} parameters, load {busy:.1f}")
    for name, pairs in (("wall", wall), ("processor", cpu)):
        ratios = [one / all_ for one, all_ in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        one, all_ = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{name}: {images / one:.0f} images/s by one, {images / all_:.0f} by all; ratio "
            f"{statistics.median(ratios):.2f} ({low:.2f} .. {high:.2f} in {len(ratios)} rounds)"
        )


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(args.size, port, args), nprocs=args.size)


if __name__ == "__main__":
    main()

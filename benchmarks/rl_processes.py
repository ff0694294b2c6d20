"""Steps per second of `dynmoe.rl` by several processes against one, on the same settings.

    python -m benchmarks.rl_processes [--size 2] [--rounds 9] [--preset laptop] [--env NAME]
        [--num-envs N] [--updates 1]

One process has a run of its own, and P others share one as under torchrun, with one thread each.
In turn, the one carries out some updates (play, learning, log) while the others wait, and the P
carry out as many. Told are the steps per second of both by the clock on the wall, their ratio, and
the same of processor time, of which other programs take nothing: what one process needs over what
all together need. JAX's own threads are in it. On a machine with a free core for each process, P
times the latter is about the ratio.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from agents.experiment import ReinforcementLearning
from agents.settings import Config
from dynmoe.lab import processes
from dynmoe.lab.run import Run
from dynmoe.rl import presets

GO, END = "go on", "end"
"""What the processes are told."""
Times = tuple[float, float]
"""seconds by the clock on the wall, and of processor time"""


def settings(args: argparse.Namespace, folder: Path) -> Config:
    """The run's."""
    config = presets()[args.preset]
    return replace(
        config, env=args.env or config.env, num_envs=args.num_envs or config.num_envs,
        device="cpu", threads=1, runs_dir=folder, name="benchmark",
    )  # fmt: skip


class Turns:
    """Lets a run go on while it is its turn: `update_done` waits for the word."""

    def __init__(self, pipe: Connection, recorder: Any, updates: int) -> None:
        self.pipe, self.told, self.updates = pipe, recorder.update_done, updates

    def begin(self) -> None:
        """Wait for the turn, or end the process after the last."""
        if self.pipe.recv() == END:
            raise SystemExit
        self.began = (time.perf_counter(), time.process_time())

    def update_done(self, update: int, *found: Any) -> None:
        """As the recorder's; a turn may be over with it."""
        self.told(update, *found)
        if update % self.updates == 0:
            now = (time.perf_counter(), time.process_time())
            self.pipe.send(tuple(b - a for a, b in zip(self.began, now, strict=True)))
            self.begin()


def work(
    rank: int, size: int, port: int, args: argparse.Namespace, folder: Path, pipe: Connection
) -> None:
    """All turns of one process, of `size` that share a run."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "bench", "RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        processes.join("cpu")
    config, experiment = settings(args, folder / f"of-{size}"), ReinforcementLearning()
    with (
        Run("rl", "benchmark", config) as run,
        closing(experiment.prepare(run, config, None)) as session,
    ):
        turns = Turns(pipe, session.recorder, args.updates)
        session.recorder.update_done = turns.update_done  # type: ignore[method-assign]
        turns.begin()
        session.work()


def turn(pipes: list[Connection]) -> Times:
    """Let the processes at these pipes have a turn: the longest of them, and the sum of theirs."""
    for pipe in pipes:
        pipe.send(GO)
    wall, used = zip(*(pipe.recv() for pipe in pipes), strict=True)
    return max(wall), sum(used)


def tell(args: argparse.Namespace, rounds: list[tuple[Times, Times]]) -> None:
    """Print rates and ratios with their quartiles."""
    config = settings(args, Path())
    steps = args.updates * config.batch_size
    print(
        f"{args.size} processes, {config.env}, {config.num_envs} environments, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    for place, name in enumerate(("wall", "processor")):
        ones, alls = ([each[who][place] for each in rounds] for who in (0, 1))
        ratios = [one / all_ for one, all_ in zip(ones, alls, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rates = [steps / statistics.median(times) for times in (ones, alls)]
        print(
            f"{name}: {rates[0]:.0f} steps/s by one, {rates[1]:.0f} by all; ratio "
            f"{statistics.median(ratios):.2f} ({low:.2f} .. {high:.2f} in {len(ratios)} rounds)"
        )


def main() -> None:
    """Start the processes, and let them take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--preset", default="laptop", choices=sorted(presets()))
    parser.add_argument("--env", default="", help="default: the preset's")
    parser.add_argument("--num-envs", type=int, default=0, help="default: the preset's")
    parser.add_argument("--updates", type=int, default=1, help="of a turn")
    args = parser.parse_args()
    updates = settings(args, Path()).updates
    if args.updates * (args.rounds + 1) >= updates:
        parser.error(f"--rounds {args.rounds}: the preset has {updates} updates; use fewer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, started = mp.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, args.size):
            for rank in range(size):
                here, there = context.Pipe()
                given = (rank, size, port, args, Path(folder), there)
                process = context.Process(target=work, args=given, daemon=True)
                process.start()
                there.close()
                pipes.append(here)
                started.append(process)
        rounds = [(turn(pipes[:1]), turn(pipes[1:])) for _ in range(args.rounds + 1)]
        tell(args, rounds[1:])  # the first is for warming up
        for pipe in pipes:
            pipe.send(END)
        for process in started:
            process.join()


if __name__ == "__main__":
    main()

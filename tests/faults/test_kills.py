"""Runs of cl that are killed at random moments, and whose newest checkpoint is damaged at times.

    KILLS=100 pytest -n 0 -m slow -rP tests/faults/test_kills.py

Each kill is SIGKILL to a process of its own, anywhere from its start to its end: while it reads
data, in a step, a save, a growth, or the last figures. After every third one the newest checkpoint
is cut off or has one bit turned, where there is one before it. Then the run goes on with --resume.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from dynmoe import cl
from dynmoe.lab import checkpoint
from dynmoe.lab.config import run_command

KILLS = int(os.environ.get("KILLS", "4"))
IN_A_ROW = 5
"""Kills of one run, at most; then it is left alone until it ends."""
WAIT_S = 240
FLAGS = (
    "--preset smoke --compare --chunks 3 --epochs 6 --eval-samples 60 --probe-samples 40 "
    "--network.width 24 --network.hidden 48 --protocol.images 150 --trigger every "
    "--trigger.steps 10 --budget.mode per-growth --checkpoint-every-s 0 --resume --name x"
)
"""54 steps with growths within tasks, and a checkpoint after each step."""


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Starts processes that have imported everything: forks of a clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dynmoe.cl", "cl_benchmarks.experiment", "cl_benchmarks.trainer", "sklearn.datasets",
         "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]
    )  # fmt: skip
    return context


def start(processes: Any, runs: Path) -> Any:
    argv = [*FLAGS.split(), "--runs-dir", str(runs)]
    process = processes.Process(target=run_command, args=(cl.main, argv))
    process.start()
    return process


def damage(folder: Path, generator: random.Random) -> Path | None:
    """Spoil the newest checkpoint, unless it is the only one; returns it."""
    paths = sorted(folder.glob("step-*.pt"))
    if len(paths) < 2:
        return None
    data = bytearray(paths[-1].read_bytes())
    if generator.random() < 0.5:
        del data[generator.randrange(len(data)) :]
    else:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    paths[-1].write_bytes(data)
    return paths[-1]


@pytest.mark.slow
def test_runs_end_as_if_they_had_not_been_killed(tmp_path: Path, processes: Any) -> None:
    began = time.monotonic()
    whole = start(processes, tmp_path / "whole")
    whole.join(WAIT_S)
    assert whole.exitcode == 0
    usual, left = time.monotonic() - began, tmp_path / "whole" / "cl" / "x" / "seed-0"
    generator, kills, damaged, ended = random.Random(0), 0, 0, 0
    while kills < KILLS:
        runs, own = tmp_path / f"killed-{ended}", 0
        folder = runs / "cl" / "x" / "seed-0"
        while True:
            process = start(processes, runs)
            last = own == IN_A_ROW or kills == KILLS
            process.join(WAIT_S if last else generator.uniform(0.02, 1.0) * usual)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills, own = kills + 1, own + 1
            if kills % 3 == 0 and not (folder / "summary.json").exists():
                damaged += damage(folder / "checkpoints", generator) is not None
            if checkpoint.exists(folder / "checkpoints"):
                assert checkpoint.load_latest(folder / "checkpoints") is not None
        assert process.exitcode == 0, (ended, kills)
        for name in ("log.jsonl", "summary.json"):
            assert (folder / name).read_bytes() == (left / name).read_bytes(), (name, ended, kills)
        assert not list(folder.rglob(".*.tmp"))
        ended += 1
    print(f"{kills} kills, {damaged} checkpoints damaged, {ended} runs: all readable, all equal")

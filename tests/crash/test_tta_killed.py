"""`python -m dynmoe.tta`, killed (SIGKILL) and started again, ends as the one never stopped.

"As" means: results.json, and each run's summary.json and log.jsonl, byte for byte.
"""

from __future__ import annotations

import fcntl
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import error_line, exit_code

from dynmoe.lab.config import run_command
from dynmoe.tta.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = (
    "--preset smoke --limit 3 --lr-scale 30 --window 2 --name x --checkpoint-every-s 0 "
    "--routing-batches 2 --compare eata --method.grow every --method.grow-wait 2 "
    "--method.max-experts 12"
)
"""Two runs of 57 images, 4 batches each, and a checkpoint after each."""
SLOW = "--method cotta --method.confidence 1.1 --method.views 100 --compare --seeds 2 --gates 0"
"""Two runs that last seconds."""


def _argv(runs: Path, flags: str = SMALL) -> list[str]:
    base = SMALL if flags == SMALL else f"{SMALL.split(' --compare')[0]} {flags}"
    return f"{base} --allow-unused --runs-dir {runs}".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The runs folder of a command that was left alone; each is run once."""
    done: dict[str, Path] = {}

    def get(flags: str) -> Path:
        if flags not in done:
            done[flags] = tmp_path_factory.mktemp("whole")
            assert exit_code(main, _argv(done[flags], flags)) == 0
        return done[flags]

    return get


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Starts processes of their own that have imported everything: forks of a clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dynmoe.experiments.tta.experiment", "timm.models.vision_transformer", "scipy",
         "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]
    )  # fmt: skip
    return context


def _assert_same(one: Path, two: Path) -> None:
    for pattern in ("results.json", "summary.json", "log.jsonl"):
        files = sorted(p.relative_to(one) for p in one.rglob(pattern))
        assert files == sorted(p.relative_to(two) for p in two.rglob(pattern))
        assert len(files) == (1 if pattern == "results.json" else 2)
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert not list(two.rglob(".*.tmp"))


def _killed_in(function: str, number: int, cache: str, argv: list[str]) -> None:
    """Run the command in a process that is killed as it calls an `os` function the nth time."""
    os.environ["XDG_CACHE_HOME"] = cache  # the server that forked this process has its own
    original, calls = getattr(os, function), itertools.count(1)

    def killing(*args: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, function, killing)
    run_command(main, argv)


def _kill_at(
    processes: Any, function: str, moments: list[int], cache: Path, argv: list[str]
) -> list[int]:
    """Exit codes of sessions, each killed at its moment, and of a last one that is left alone."""
    codes = []
    for number in [*moments, 10_000]:
        args = (function, number, str(cache), argv)
        process = processes.Process(target=_killed_in, args=args)
        process.start()
        process.join(240)
        codes.append(process.exitcode)
    return codes


def test_killed_at_some_writes(
    whole: Callable[[str], Path], processes: Any, tmp_path: Path
) -> None:
    """From an empty cache: in the source model's training, amid checkpoints, before the report."""
    moments = [2, 4, 9, 3]
    codes = _kill_at(processes, "replace", moments, tmp_path / "cache", _argv(tmp_path / "runs"))
    assert codes == [-signal.SIGKILL] * len(moments) + [0]
    _assert_same(whole(SMALL), tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_killed_at_every_write(
    function: str, whole: Callable[[str], Path], processes: Any, tmp_path: Path
) -> None:
    """The nth session is killed at its nth write: the last ones are in the report."""
    codes = _kill_at(
        processes, function, list(range(1, 40)), tmp_path / "cache", _argv(tmp_path / "runs")
    )
    killed = codes.index(0)
    assert killed > 6 and set(codes[:killed]) == {-signal.SIGKILL} and set(codes[killed:]) == {0}
    _assert_same(whole(SMALL), tmp_path / "runs")


@pytest.mark.slow
def test_killed_at_random_moments(
    whole: Callable[[str], Path], processes: Any, shared_cache: Path, tmp_path: Path
) -> None:
    moments, kills = random.Random(0), 0
    expected = whole(SLOW)
    while True:
        args = ("replace", 10_000, str(shared_cache), _argv(tmp_path, SLOW))
        process = processes.Process(target=_killed_in, args=args)
        process.start()
        process.join(moments.uniform(0.3, 2.0) if kills < 12 else 240)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills > 2
    _assert_same(expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["command", pytest.param("worker", marks=pytest.mark.slow)])
def test_killed_with_two_processes_at_work(
    who: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """The other processes end too, and leave their runs to the next session."""
    expected = whole(SLOW)
    command = [sys.executable, "-m", "dynmoe.tta", *_argv(tmp_path, SLOW), "--jobs", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while len({p.parent for p in tmp_path.rglob("*.pt")}) < 2:
        assert process.poll() is None and time.monotonic() - began < 240
        time.sleep(0.005)
    locks = sorted(tmp_path.rglob(".lock"))
    os.kill(process.pid if who == "command" else int(locks[0].read_text()), signal.SIGKILL)
    err = process.communicate(timeout=200)[1]
    if who == "command":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 4 and "was killed" in error_line(err)
    assert not list(tmp_path.rglob("results.json"))
    for lock in locks:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for the process that holds it to end
    assert exit_code(main, _argv(tmp_path, SLOW)) == 0
    _assert_same(expected, tmp_path)

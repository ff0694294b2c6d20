"""A run that was stopped, however often and however rudely, ends as the one that never stopped.

"As" means: summary.json and log.jsonl byte for byte, and the last checkpoint value for value.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import assert_same, exit_code, last_checkpoint, stop_at

from cl_benchmarks.recorder import TaskRecorder
from dynmoe import cl
from dynmoe.lab import checkpoint
from dynmoe.lab.config import run_command

ROOT = Path(__file__).parents[2]
WAIT_S = 240
"""for another process: much, as the machine may be busy with other tests"""
SMALL = (
    "--preset smoke --compare --chunks 3 --epochs 2 --eval-samples 60 "
    "--probe-samples 40 --network.width 24 --network.hidden 48 --checkpoint-every-s 0"
)
"""3 tasks of 2 epochs of 3 batches: 18 optimizer steps and a checkpoint after each."""
CASES = {
    "constant budget": "",
    "per-growth budget": "--budget.mode per-growth",
    "growth within tasks": "--trigger every --trigger.steps 4 --budget.mode per-growth",
    "sgd": "--optimizer sgd --lr 0.05 --init duplicate",
    "fresh": "--method fresh",
    "reset and augment": "--optimizer adamw --weight-decay 0.01 --reset-optimizer "
    "--augment crop-flip --clip 0.5",
    "topk": "--router topk --balance switch",
    "class stream": "--protocol class --chunks 5 --epochs 1 --batch-size 100",
    "gradient trigger": "--trigger gradient --trigger.share 0.97 --trigger.memory 2 "
    "--trigger.cooldown 3 --granularity 1 --new-experts.lr 0.5 --new-experts.lr-steps 2 "
    "--new-experts.logit -2 --new-experts.logit-steps 2",
    "dormancy trigger": "--trigger dormancy --trigger.every 2 --trigger.rise 0.02 "
    "--trigger.cooldown 3 --granularity 1",
    "net2wider": "--method net2wider --intervention l2-init",
    "progressive": "--method progressive --intervention l2-init",
    "permuted replay": "--protocol permuted --protocol.images 150 --intervention replay "
    "--intervention.size 40 --augment crop-flip",
    "old tasks": "--protocol domains --batch-size 100 --old-samples 40",
    "ewc": "--intervention ewc --budget.mode per-growth",
}


def _argv(runs: Path, extra: str = "") -> list[str]:
    images = "" if "--protocol" in extra else "--protocol.images 150"
    return f"{SMALL} {images} {extra} --name x --runs-dir {runs}".split()


def _folder(runs: Path) -> Path:
    return runs / "cl" / "x" / "seed-0"


def _exit_code(argv: list[str]) -> int:
    return exit_code(cl.main, argv)


def _assert_same_run(one: Path, two: Path) -> None:
    for name in ("log.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    last = [last_checkpoint(folder) for folder in (one, two)]
    assert last[0] is not None and last[0]["state"]["trainer"]["model"]
    assert_same(last[0], last[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the run with these extra flags that was left alone; each is run once."""
    done: dict[str, Path] = {}

    def get(extra: str) -> Path:
        if extra not in done:
            runs = tmp_path_factory.mktemp("whole")
            assert _exit_code(_argv(runs, f"{extra} --checkpoint-every-s 1000")) == 0
            done[extra] = _folder(runs)
        return done[extra]

    return get


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("case", "every"), [("growth within tasks", 1), *((case, 3) for case in CASES)]
)
def test_stopped_after_steps(
    case: str,
    every: int,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted(CASES[case])
    stop_at(monkeypatch, TaskRecorder, "batch_done", every)
    sessions = 1
    while (code := _exit_code(_argv(tmp_path, f"{CASES[case]} --resume"))) != 0:
        assert code == 143
        sessions += 1
    steps = checkpoint.load_latest(whole / "checkpoints")["step"]  # type: ignore[index]
    assert steps > 14 and sessions == steps // every + 1
    _assert_same_run(whole, _folder(tmp_path))


@pytest.mark.parametrize(("moment", "stops"), [("epoch_done", 6), ("task_done", 3)])
def test_stopped_between_epochs_and_tasks(
    moment: str,
    stops: int,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = CASES["growth within tasks"]
    whole = uninterrupted(extra)
    stop_at(monkeypatch, TaskRecorder, moment)
    codes = [_exit_code(_argv(tmp_path, f"{extra} --resume")) for _ in range(stops + 1)]
    assert codes == [143] * stops + [0]
    _assert_same_run(whole, _folder(tmp_path))


def test_second_interrupt_stops_at_once(
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two Ctrl-C before the first epoch's end: nothing more is saved, and nothing is lost."""
    original = TaskRecorder.epoch_done

    def interrupted(self: TaskRecorder, trainer: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        original(self, trainer)

    monkeypatch.setattr(TaskRecorder, "epoch_done", interrupted)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert _exit_code(_argv(tmp_path)) == 130
    assert "stopped at once" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint.load_latest(_folder(tmp_path) / "checkpoints")["step"] == 3  # type: ignore[index]
    monkeypatch.setattr(TaskRecorder, "epoch_done", original)
    assert _exit_code(_argv(tmp_path, "--resume")) == 0
    _assert_same_run(uninterrupted(""), _folder(tmp_path))


def test_sigterm_to_a_real_process(uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    """It saves, exits with 143 and prints the command that goes on."""
    extra = "--epochs 12"
    command = [sys.executable, "-m", "dynmoe.cl", *_argv(tmp_path, extra)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _wait_for_checkpoint(tmp_path, process.poll)
    process.terminate()
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "SIGTERM" in errors[0] and "Traceback" not in err
    advice = shlex.split(errors[0].split("go on with: ")[1])
    assert advice == ["python", "-m", "dynmoe.cl", *command[3:], "--resume"]
    assert _exit_code(advice[3:]) == 0
    _assert_same_run(uninterrupted(extra), _folder(tmp_path))


def _wait_for_checkpoint(runs: Path, ended: Callable[[], object]) -> None:
    """Until there is a checkpoint that was not there before."""
    folder = _folder(runs) / "checkpoints"
    before, began = set(folder.glob("*.pt")), time.monotonic()
    while set(folder.glob("*.pt")) == before and ended() is None:
        assert time.monotonic() - began < WAIT_S
        time.sleep(0.005)


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Starts processes of their own that have imported everything: forks of a clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dynmoe.cl", "cl_benchmarks.experiment", "cl_benchmarks.trainer", "sklearn.datasets",
         "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]
    )  # fmt: skip
    return context


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param("constant budget", marks=pytest.mark.slow), "growth within tasks"]
)
def test_killed_at_random_moments(
    case: str, uninterrupted: Callable[[str], Path], tmp_path: Path, processes: Any
) -> None:
    extra = f"{CASES[case]} --epochs 7"
    moments, kills = random.Random(case), 0
    while True:
        argv = _argv(tmp_path, f"{extra} --resume")
        process = processes.Process(target=run_command, args=(cl.main, argv))
        process.start()
        _wait_for_checkpoint(tmp_path, lambda p=process: p.exitcode)  # type: ignore[misc]
        process.join(moments.uniform(0.0, 0.3) if kills < 3 else WAIT_S)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 2
    _assert_same_run(uninterrupted(extra), _folder(tmp_path))


def _killed_in(function: str, number: int, argv: list[str]) -> None:
    """Run the command in a process that is killed as it calls an `os` function the nth time."""
    original, calls = getattr(os, function), itertools.count(1)

    def killing(*args: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, function, killing)
    run_command(cl.main, argv)


@pytest.mark.parametrize(
    ("function", "moments"), [pytest.param("fsync", 18, marks=pytest.mark.slow), ("replace", 5)]
)
def test_killed_while_files_are_written(
    function: str,
    moments: int,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    processes: Any,
) -> None:
    """Before and after each rename, with half of the files of a checkpoint in place."""
    extra, steps = "--epochs 4", [0]
    for number in [*range(1, moments + 1), 10_000]:
        process = processes.Process(
            target=_killed_in, args=(function, number, _argv(tmp_path, f"{extra} --resume"))
        )
        process.start()
        process.join(WAIT_S)
        assert process.exitcode == (-signal.SIGKILL if number <= moments else 0)
        saved = checkpoint.load_latest(_folder(tmp_path) / "checkpoints")
        steps.append(saved["step"] if saved else 0)
    assert steps == sorted(steps) and steps[-2] > 0
    _assert_same_run(uninterrupted(extra), _folder(tmp_path))
    assert not list(_folder(tmp_path).rglob(".*.tmp"))

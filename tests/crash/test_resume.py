"""A run that was stopped, however often and however rudely, ends as the one that never stopped.

"As" means: summary.json and log.jsonl byte for byte, and the last checkpoint value for value.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks.recorder import Recorder
from dynmoe import checkpoint, cl
from dynmoe.config import run_command

ROOT = Path(__file__).parents[2]
SMALL = (
    "--preset smoke --compare --chunks 3 --epochs 2 --eval-samples 60 "
    "--probe-samples 40 --network.width 24 --network.hidden 48 --checkpoint-every-s 0"
)
"""3 tasks of 2 epochs of 3 batches: 18 optimizer steps and a checkpoint after each."""
STEPS = 18
CASES = {
    "constant budget": "",
    "per-growth budget": "--budget.mode per-growth",
    "growth within tasks": "--trigger every --trigger.steps 4 --budget.mode per-growth",
    "sgd": "--optimizer sgd --lr 0.05 --init duplicate",
    "fresh": "--method fresh",
    "reset and augment": "--optimizer adamw --weight-decay 0.01 --reset-optimizer "
    "--augment crop-flip --clip 0.5",
    "topk": "--router topk --balance-weight 0.01",
    "class stream": "--protocol class --chunks 5 --epochs 1 --batch-size 100",
}


def _argv(runs: Path, extra: str = "") -> list[str]:
    images = "" if "--protocol" in extra else "--protocol.images 150"
    return f"{SMALL} {images} {extra} --name x --runs-dir {runs}".split()


def _folder(runs: Path) -> Path:
    return runs / "cl" / "x" / "seed-0"


def _exit_code(argv: list[str]) -> int:
    """Run the command in this process."""
    try:
        run_command(cl.main, argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _assert_same(one: Any, two: Any, where: str = "") -> None:
    """Equal in every tensor and value, however deep."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            _assert_same(a, b, f"{where}/{i}")
    else:
        assert one == two, where


def _assert_same_run(one: Path, two: Path) -> None:
    for name in ("log.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    last = [checkpoint.load_latest(folder / "checkpoints") for folder in (one, two)]
    assert last[0] is not None and last[0]["state"]["strategy"]["model"]
    _assert_same(*last)


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


def _stop_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let SIGTERM arrive each time the recorder is told of a step, an epoch or a task."""
    original = getattr(Recorder, name)

    def signalled(self: Recorder, strategy: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(self, strategy)

    monkeypatch.setattr(Recorder, name, signalled)


@pytest.mark.parametrize("case", CASES)
def test_stopped_after_every_single_step(
    case: str,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted(CASES[case])
    _stop_in(monkeypatch, "step_done")
    sessions = 1
    while (code := _exit_code(_argv(tmp_path, f"{CASES[case]} --resume"))) != 0:
        assert code == 143
        sessions += 1
    steps = checkpoint.load_latest(whole / "checkpoints")["step"]  # type: ignore[index]
    assert sessions == steps + 1 > 15
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
    _stop_in(monkeypatch, moment)
    codes = [_exit_code(_argv(tmp_path, f"{extra} --resume")) for _ in range(stops + 1)]
    assert codes == [143] * stops + [0]
    _assert_same_run(whole, _folder(tmp_path))

"""Sweeps whose runs are stopped in the middle end as undisturbed ones do, wherever they run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dynmoe import sweep
from dynmoe.lab import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SWEEP = ["cl", "--jobs", "2", "--name", "s", "--seeds", "2", "--grid", "granularity: 2"]
RUN = ["--preset", "smoke", "--chunks", "2", "--epochs", "6", "--eval-samples", "60",
       "--probe-samples", "40", "--checkpoint-every-s", "0.5"]  # fmt: skip


def argv(runs: Path, *launcher: str) -> list[str]:
    return [*SWEEP, *launcher, "--runs-dir", str(runs), "--", *RUN]


def found(runs: Path) -> dict[str, str]:
    """Seed -> the summary of its run."""
    return {path.parent.name: path.read_text() for path in runs.rglob("summary.json")}


def sessions(runs: Path) -> list[int]:
    """How often each run was begun or went on, fewest first."""
    files = runs.rglob("environment.json")
    return sorted(len(json.loads(file.read_text())["sessions"]) for file in files)


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def wait_for(runs: Path, count: int, sign: Callable[[Path], bool]) -> list[Path]:
    """The folders of so many runs, once they show a sign."""
    while True:
        found = [f for f in runs.glob("cl/studies/*/seed-*") if sign(f)]
        if len(found) >= count:
            return sorted(found)
        time.sleep(0.02)


def saved(folder: Path) -> bool:
    return checkpoint.exists(folder / "checkpoints")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    runs = tmp_path_factory.mktemp("undisturbed")
    sweep.main(argv(runs))
    assert sessions(runs) == [1, 1]
    return found(runs)


@pytest.fixture(autouse=True)
def _found_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes find our packages."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def test_a_killed_sweep_goes_on(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "dynmoe.sweep", *argv(tmp_path)])
    wait_for(tmp_path, 1, saved)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(found(tmp_path)) < 2
    sweep.main(argv(tmp_path))
    assert found(tmp_path) == undisturbed and sessions(tmp_path)[-1] == 2


def test_runs_that_make_room_in_slurm_go_on(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    pytest.importorskip("submitit")

    def signals() -> None:
        first = wait_for(tmp_path, 1, saved)[0]
        os.kill(int((first / ".lock").read_text()), signal.SIGUSR2)
        [other] = {*wait_for(tmp_path, 2, saved)} - {first}
        os.kill(int((other / ".lock").read_text()), signal.SIGTERM)

    in_background(signals)
    sweep.main(argv(tmp_path, "--launcher", "submitit", "--cluster", "local"))
    assert found(tmp_path) == undisturbed and sessions(tmp_path) == [2, 2]

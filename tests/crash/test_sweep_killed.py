"""Sweeps whose runs are stopped in the middle end as undisturbed ones do, wherever they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_helpers import argv, found, in_background, saved, sessions, wait_for

from dynmoe import sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


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

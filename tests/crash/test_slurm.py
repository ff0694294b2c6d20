"""Sweeps on a real SLURM of one node: runs that are requeued, pre-empted, cancelled or killed.

SLURM's programs come with Debian and Ubuntu: apt-get install --no-install-recommends slurm-wlm
munge. The node is started in a temporary folder and is reached from this machine alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_node
from sweep_helpers import argv, found, in_background, saved, sessions, wait_for

from dynmoe import sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        bool(slurm_node.missing()),
        reason=f"no {', '.join(slurm_node.missing())} here; run: {slurm_node.INSTALL}",
    ),
]
LONG = ("--chunks", "3", "--epochs", "24")
"""Runs that are still under way when they are disturbed."""


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A node that all tests share, and that the commands of this process find."""
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch, slurm_node.node(folder) as own:
        for name, value in own.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The summaries of the same runs in processes of this machine."""
    runs = tmp_path_factory.mktemp("undisturbed")
    sweep.main(argv(runs, more=LONG))
    return found(runs)


def on_slurm(runs: Path, *more: str) -> list[str]:
    return argv(runs, "--launcher", "submitit", *more, more=LONG)


def jobs(state: str = "R") -> list[str]:
    """Ids of the jobs in a state."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--states={state}"]
    return subprocess.check_output(command, text=True).split()


def tell(*command: str) -> None:
    subprocess.run(command, check=True)


def test_runs_that_are_requeued_go_on(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """One by SLURM (SIGTERM), the other by its own choice, told to by SIGUSR1."""

    def disturb() -> None:
        wait_for(tmp_path, 2, saved)
        one, other = jobs()
        tell("scontrol", "requeue", one)
        tell("scancel", "--signal=USR1", other)

    in_background(disturb)
    sweep.main(on_slurm(tmp_path, "--retries", "0"))
    assert found(tmp_path) == undisturbed and sessions(tmp_path) == [2, 2]


def test_runs_that_are_pre_empted_go_on(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """They make room within their grace time, and are back when the other job has ended."""
    cpus, done = str(os.cpu_count()), tmp_path / "urgent"

    def disturb() -> None:
        wait_for(tmp_path, 2, saved)
        tell("sbatch", "--partition=urgent", f"--cpus-per-task={cpus}", "--output=/dev/null",
             f"--wrap=touch '{done}'")  # fmt: skip

    in_background(disturb)
    sweep.main(on_slurm(tmp_path, "--retries", "0", "--cpus", str((int(cpus) + 1) // 2)))
    assert done.exists()
    assert found(tmp_path) == undisturbed and sessions(tmp_path) == [2, 2]


def test_a_killed_run_is_tried_again(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """It leaves no result; SLURM's queue tells that it has ended."""

    def disturb() -> None:
        first = wait_for(tmp_path, 1, saved)[0]
        os.kill(int((first / ".lock").read_text()), signal.SIGKILL)

    in_background(disturb)
    sweep.main(on_slurm(tmp_path))
    assert found(tmp_path) == undisturbed and sessions(tmp_path) == [1, 2]


def test_a_sweep_that_is_stopped_cancels_its_runs(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """They save; the sweep goes on with them when it is started again."""
    process = subprocess.Popen([sys.executable, "-m", "dynmoe.sweep", *on_slurm(tmp_path)])
    wait_for(tmp_path, 2, saved)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM and not found(tmp_path)
    assert not jobs("R,PD,CG")
    sweep.main(on_slurm(tmp_path))
    assert found(tmp_path) == undisturbed and sessions(tmp_path) == [2, 2]

"""Long runs: memory, open files and TensorBoard's files stay as they are.

    pytest -n 0 -m slow -s tests/faults/test_long_runs.py -k flat             # 10,000 steps each
    MINUTES=30 pytest -n 0 -m slow -s tests/faults/test_long_runs.py -k soak  # of each command

The first takes one run of 10,000 optimizer steps and 50 growths; the second takes run after run in
one process until the time is over, and stops it with SIGTERM. A process is looked at from outside.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from dynmoe.lab import checkpoint

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("MINUTES", "30"))
LOOK_S = 0.5
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6
GROWS_MB, GROWS_HANDLES = 16.0, 2
"""What a process may have more of in the last fifth of its time than in the second."""
RUNS = {
    "cl": (
        "--preset smoke --compare --chunks 10 --epochs 200 --eval-samples 60 --probe-samples 40 "
        "--network.width 24 --network.hidden 104 --granularity 1 "
        "--trigger every --trigger.steps 195 --checkpoint-every-s 5 --name x"
    ),
    "rl": (
        "--preset smoke --encoder.hidden 104 --encoder.widths 16 --num-envs 4 --rollout-steps 16 "
        "--total-steps 80000 --minibatches 4 --epochs 2 --probe-every 25 --probe-samples 32 "
        "--budget.mode constant --trigger every --trigger.steps 1550 --checkpoint-every-s 5 "
        "--name x"
    ),
}
"""10 tasks of 200 epochs of 5 batches; 1,250 updates of 8 optimizer steps."""


@dataclass(frozen=True)
class Look:
    """A process and its folder at one moment."""

    memory: float
    """resident, MB"""
    handles: int
    events: int
    """TensorBoard's files of the run under way"""


def look(pid: int, runs: Path) -> Look | None:
    """None once it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        handles = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
    folders = [path.parent for path in runs.rglob("environment.json")]
    events = max((len(list(f.glob("events.out.tfevents.*"))) for f in folders), default=0)
    return Look(pages * PAGE_MB, handles, events)


def watch(command: str, runs: Path, flags: str, seconds: float | None) -> tuple[int, list[Look]]:
    """Run a command, to its end or for some time; its exit code and what was seen."""
    argv = [sys.executable, "-m", f"dynmoe.{command}", *flags.split(), "--runs-dir", str(runs)]
    with open(runs / "output.txt", "w") as output:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=output, stderr=output)
    seen, began = list[Look](), time.monotonic()
    while process.poll() is None:
        found = look(process.pid, runs)
        if found is not None and found.events:  # it works
            seen.append(found)
        if seconds is not None and time.monotonic() - began > seconds:
            process.send_signal(signal.SIGTERM)
            process.wait()
        time.sleep(LOOK_S)
    return process.returncode, seen


def check_flat(command: str, seen: list[Look]) -> str:
    """The last fifth against the second; the first has what is made once."""
    fifth = len(seen) // 5
    early, late = seen[fifth : 2 * fifth], seen[-fifth:]
    memory = [median(one.memory for one in part) for part in (early, late)]
    handles = [max(one.handles for one in part) for part in (early, late)]
    events = max(one.events for one in seen)
    told = (
        f"{command}: memory {memory[0]:.0f} MB -> {memory[1]:.0f} MB (most "
        f"{max(one.memory for one in seen):.0f}), open files {handles[0]} -> {handles[1]}, "
        f"TensorBoard's files {events}"
    )
    print(told, flush=True)
    assert fifth > 3, "too short to tell"
    assert memory[1] - memory[0] < GROWS_MB, told
    assert handles[1] - handles[0] <= GROWS_HANDLES, told
    assert events == 1, told
    return told


def summaries(runs: Path) -> list[Path]:
    return sorted(runs.rglob("summary.json"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", RUNS)
def test_flat_over_ten_thousand_steps_and_fifty_growths(command: str, tmp_path: Path) -> None:
    code, seen = watch(command, tmp_path, RUNS[command], None)
    assert code == 0, (tmp_path / "output.txt").read_text()
    (summary,) = summaries(tmp_path)
    assert len(json.loads(summary.read_text())["growth"]) >= 50
    check_flat(command, seen)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", RUNS)
def test_soak_of_run_after_run_in_one_process(command: str, tmp_path: Path) -> None:
    code, seen = watch(command, tmp_path, f"{RUNS[command]} --seeds 1000", 60 * MINUTES)
    assert code == 128 + signal.SIGTERM, (tmp_path / "output.txt").read_text()
    check_flat(command, seen)
    folders = {path.parent for path in tmp_path.rglob("environment.json")}
    unfinished = folders - {path.parent for path in summaries(tmp_path)}
    print(f"{command}: {MINUTES:g} minutes, {len(folders) - len(unfinished)} runs finished")
    assert len(unfinished) <= 1
    for folder in unfinished:
        assert checkpoint.load_latest(folder / "checkpoints") is not None

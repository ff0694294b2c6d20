"""A small sweep of two runs that is disturbed in tests, and what its folder tells afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dynmoe.lab import checkpoint

SWEEP = ["cl", "--jobs", "2", "--name", "s", "--seeds", "2", "--grid", "granularity: 2"]
RUN = ["--preset", "smoke", "--chunks", "2", "--epochs", "6", "--eval-samples", "60",
       "--probe-samples", "40", "--checkpoint-every-s", "0.5"]  # fmt: skip


def argv(runs: Path, *launcher: str, more: tuple[str, ...] = ()) -> list[str]:
    """The sweep's flags; `more` are for its runs."""
    return [*SWEEP, *launcher, "--runs-dir", str(runs), "--", *RUN, *more]


def found(runs: Path) -> dict[str, str]:
    """Seed -> the summary of its run."""
    return {path.parent.name: path.read_text() for path in runs.rglob("summary.json")}


def sessions(runs: Path) -> list[int]:
    """How often each run was begun or went on, fewest first."""
    files = runs.rglob("environment.json")
    return sorted(len(json.loads(file.read_text())["sessions"]) for file in files)


def in_background(act: Callable[[], None]) -> threading.Thread:
    """The thread that does it."""
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
    """Whether a run has a checkpoint."""
    return checkpoint.exists(folder / "checkpoints")

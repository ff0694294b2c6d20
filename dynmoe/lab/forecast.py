"""What runs would cost, told from the time that finished ones of the same command took."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from statistics import median

from dynmoe.lab.checkpoint import exists
from dynmoe.lab.runner import Job


def print_forecast(jobs: list[Job], runs_dir: Path, at_once: int) -> None:
    """Print a line for each run, whether it is done, and what those that are not would cost.

    Args:
        jobs: the runs.
        runs_dir: where finished runs are looked for.
        at_once: runs at a time.
    """
    by_folder = {job.folder: job for job in jobs}
    todo = []
    for folder, job in by_folder.items():
        state = "finished" if job.done else "to do"
        if state == "to do":
            state = "begun" if exists(folder / "checkpoints") else state
            todo.append(job)
        print(f"{state:8}  {job.label}  {folder}")
    finished = len(by_folder) - len(todo)
    print(f"{len(by_folder)} runs, {finished} finished; {_cost(todo, runs_dir, at_once)}")


def _cost(todo: list[Job], runs_dir: Path, at_once: int) -> str:
    """What is left, in words."""
    if not todo:
        return "nothing to do"
    command = todo[0].experiment.command
    known = durations(runs_dir / command)
    if not known:
        return f"cost unknown: no finished run of {command} in {runs_dir} to tell it from"
    everywhere = median(known.values())
    total = 0.0
    for job in todo:
        like = [s for folder, s in known.items() if folder.parent == job.folder.parent]
        total += median(like) if like else everywhere
    at_once = min(at_once, len(todo))
    return (
        f"what is left takes about {_words(total)} of one process, {_words(total / at_once)} on "
        f"{at_once}, as {len(known)} finished runs of {command} tell, those of the same settings "
        "where there are such"
    )


def durations(folder: Path) -> dict[Path, float]:
    """Folder -> seconds that the run took, of all finished runs below a folder.

    Runs of several sessions are left out: nobody knows when the earlier ones ended.
    """
    found = {}
    for summary in folder.rglob("summary.json"):
        try:
            (one,) = json.loads((summary.parent / "environment.json").read_text())["sessions"]
            began = datetime.strptime(one["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[summary.parent] = max(summary.stat().st_mtime - began, 0.0)
    return found


def _words(seconds: float) -> str:
    """A span of time with the unit that fits."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"

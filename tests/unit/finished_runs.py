"""Runs of `cl` for tests of sweeps and searches: small ones, and finished ones without the work."""

from __future__ import annotations

import json
import time

from dynmoe.lab.config import to_dict
from dynmoe.lab.runner import Job

FLAGS = ["--preset", "smoke"]
TINY = [*FLAGS, "--chunks", "2", "--epochs", "1", "--eval-samples", "60", "--probe-samples", "40"]
"""A run of a second or two."""


def finish(job: Job, accuracy: float, seconds: float = 0.0) -> None:
    """As the run would leave it, with one task."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.json").write_text(json.dumps(to_dict(job.config)))
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - seconds))
    sessions = {"sessions": [{"started": began}]}
    (job.folder / "environment.json").write_text(json.dumps(sessions))
    tasks = [{"train_accuracy": accuracy}]
    (job.folder / "summary.json").write_text(json.dumps({"tasks": tasks}))

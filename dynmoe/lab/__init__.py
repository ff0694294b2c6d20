"""The laboratory: settings, runs, checkpoints, logs, statistics. It knows no model and no data."""

from dynmoe.lab.results import Result, RunRow, load_runs

__all__ = ["Result", "RunRow", "load_runs"]

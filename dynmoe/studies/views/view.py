"""What a study has to know of the command whose runs it compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dynmoe.lab.config import digest, parse
from dynmoe.lab.jobs import Job, make_jobs
from dynmoe.lab.statistics import Interval

if TYPE_CHECKING:
    from dynmoe.studies.design import Results

At = Literal["first", "last", "mean"]
"""part of a stream: its first task, its last task, or all; views of others say what it means"""


class View(ABC):
    """Base of the views. Without state.

    Attributes:
        metric: what a verdict is about, unless it names another.
        at: the tasks that it is about, unless it names others.
        span: from where to where in a stream gains and losses are told.
        columns: (heading, metric, at) of the tables.
        references: variants that every study of the command must have.
    """

    metric: ClassVar[str]
    at: ClassVar[At] = "last"
    span: ClassVar[str] = "first to last task"
    columns: ClassVar[tuple[tuple[str, str, At], ...]]
    references: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def jobs(self, argv: list[str], seeds: list[int], runs_dir: Path, label: str) -> list[Job]:
        """One run of the flags per seed, in folders named after the settings.

        Studies thus share what they have in common.

        Raises:
            UserError: flags that do not fit.
        """

    @abstractmethod
    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """A number of one run's summary."""

    @abstractmethod
    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """A variant's numbers for results.json: every seed, and intervals."""

    @abstractmethod
    def draw(self, path: Path, results: Results, title: str) -> None:
        """The study's figure, as a PNG file written atomically."""

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Factor, name and digits that a metric is shown with; shares as points of 100."""
        return 100.0, " points", 1

    def describe(self, metric: str, at: At) -> str:
        """A metric in words."""
        return metric.replace("_", " ")


def named_jobs(
    command: str,
    presets: dict[str, Any],
    argv: list[str],
    seeds: list[int],
    runs_dir: Path,
    label: str,
) -> list[Job]:
    """`View.jobs` of a command whose run is one method: in `runs_dir/command/studies`."""
    _, config = parse(presets, [*argv, "--allow-unused"], f"python -m dynmoe.{command}", "")
    name = f"studies/{config.method.part.name}-{digest(config)}"
    return make_jobs(command, name, argv, seeds, runs_dir, label)


def three(interval: Interval) -> list[float | None]:
    """(point, low, high) for JSON; ends that are not known become null."""
    return [None if x != x else round(float(x), 4) for x in interval]

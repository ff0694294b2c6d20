"""What a command does: the contract that cl, rl, tta and dg keep.

An `Experiment` knows the settings and the figures of its runs, and prepares each as a `Session`.
`runner.py` carries runs out, `Results` compares them, `report.py` writes them up. Shares are in
0..1, and their differences are told in points (of 100).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from dynmoe.errors import UserError, unknown
from dynmoe.lab.config import RunConfig, check_name
from dynmoe.lab.export import Exporter
from dynmoe.lab.mirrors import check_mirrors
from dynmoe.lab.recorder import Recorder
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import (
    Family,
    Interval,
    confidence_interval,
    probability_of_improvement,
    seeds_to_see,
)
from dynmoe.ranges import check_settings

At = Literal["first", "last", "mean", "worst", "slope"]
"""part of a run: its first task, its last one, all; experiments without tasks say what it means"""
Column = tuple[str, str, At]
"""heading, metric, part of the run"""


@dataclass(frozen=True)
class Curve:
    """A number along one run."""

    clock: str
    """what `points` count: "task", "environment steps" """
    points: list[tuple[float, float]]
    """(place, value) in order; places without a value are left out"""


@dataclass(frozen=True)
class Details:
    """What a page about finished runs shows of one, beside its metrics."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """name -> curve; `Experiment.unit` of the name says how it is shown"""
    matrices: dict[str, list[list[float]]] = field(default_factory=dict)
    """title -> [R][C] shares; nan where there is none"""
    growths: list[dict[str, Any]] = field(default_factory=list)
    """one for each growth, in order: step, experts, parameters"""
    cost: dict[str, float] = field(default_factory=dict)
    """what it takes: heading -> number"""


class Session(ABC):
    """One run at work.

    Attributes:
        recorder: writes the run down.
        model: the network that is trained, or None.
    """

    recorder: Recorder
    model: nn.Module | None = None

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` was when a checkpoint was written."""

    @abstractmethod
    def work(self) -> None:
        """All steps that are left; tells the recorder of each."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything to go on from, as plain values and tensors."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """The figures of the whole run: nothing that changes when it is repeated."""

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Free what the run has opened."""


@dataclass(frozen=True)  # without fields: two objects of a class are equal, and can be pickled
class Experiment(ABC):
    """Base of the experiments.

    Attributes:
        command: its name on the command line.
        least: setting -> the smallest value that can work; parts check their own options.
        metric: what a verdict is about, unless it names another.
        search_metric: what a search of settings wants much of, unless it names another.
        at: the part of a run that it is about, unless it names another.
        span: the two parts of a run that `Results.kept` compares.
        columns: of the tables.
        lesser: headings of those that lose their intervals in a terminal that is too narrow.
        legend: what their headings leave unsaid, for the line below a table.
        references: variants that every study of the command must have.
        missing: shown in tables where a run does not have the metric.
        about: settings that say what a run is about, not how it goes about it: where runs differ
            in one, they are on different streams.
        on_processes: several processes may share a run, see `processes.py`.
        smoke_is_small: what preset smoke finds says nothing of the methods.
    """

    command: ClassVar[str]
    least: ClassVar[dict[str, float]] = {}
    metric: ClassVar[str]
    search_metric: ClassVar[str] = ""  # the metric
    at: ClassVar[At] = "last"
    span: ClassVar[str] = "first to last task"
    columns: ClassVar[tuple[Column, ...]]
    lesser: ClassVar[tuple[str, ...]] = ()
    legend: ClassVar[str] = ""
    references: ClassVar[tuple[str, ...]] = ()
    missing: ClassVar[str] = ""
    about: ClassVar[tuple[str, ...]] = ()
    on_processes: ClassVar[bool] = False
    smoke_is_small: ClassVar[bool] = True

    # -- settings

    def check(self, config: Any) -> None:
        """Refuse settings that cannot work before any work is done.

        Raises:
            UserError: names the flag.
        """
        check_settings(config)
        check_name(config.name)
        check_mirrors(config.mirror)
        for name, least in {"seeds": 1, "jobs": 1, "threads": 0, **self.least}.items():
            value = getattr(config, name)
            if not value >= least:  # also refuses nan
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value} is too small; use {least} or more")

    def settle(self, config: Any) -> Any:
        """The settings with those filled in that follow from the data; as they are by default."""
        return config

    @abstractmethod
    def variants(self, config: Any, shared: Any) -> dict[str, dict[str, Any]]:
        """What a command line compares: stream -> label -> settings, the main run's first."""

    @abstractmethod
    def label(self, config: Any, shared: Any) -> str:
        """A part of the run's default name, such as its method and data set."""

    # -- one run

    @abstractmethod
    def load(self, config: Any) -> Any:
        """Data and models that the runs of a comparison share; no run may change them.

        Raises:
            UserError: they cannot be had.
        """

    def inputs(self, config: Any, shared: Any) -> dict[str, str]:
        """What a run reads from files that the settings only name -> digest of what is in there.

        None by default; see `dynmoe.lab.inputs`.
        """
        return {}

    @abstractmethod
    def prepare(self, run: Run, config: Any, shared: Any) -> Session:
        """A run that is about to begin, or to go on."""

    def finished(self, run: Run, config: Any, shared: Any, now: bool) -> None:  # noqa: B027
        """A run is done: draw it. `now`: in this process; else its summary was read."""

    # -- what runs add up to

    @abstractmethod
    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """A number of one run's summary; nan where it has none."""

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Factor, name and digits that a metric is shown with; shares as points of 100."""
        return 100.0, " points", 1

    def lacking(self, metric: str) -> str:
        """What a table shows for a number that no run has; columns of "" are left out."""
        return self.missing if metric == self.metric else ""

    def describe(self, metric: str, at: At) -> str:
        """A metric in words."""
        return metric.replace("_", " ")

    def beside(self, results: Results, stream: str) -> dict[str, dict[str, Any]]:
        """Name -> a summary, as `value` reads it, of what stands in tables beside the runs.

        None by default. It has no seeds and no folder, and `value` may be nan.
        """
        return {}

    def details(self, summary: dict[str, Any]) -> Details:
        """What `dynmoe.report` shows of one run's summary beside the columns; nothing by default.

        Raises:
            KeyError, TypeError, ValueError: it is no summary of this command.
        """
        return Details()

    @abstractmethod
    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """A variant's numbers for results.json: every seed, and intervals."""

    @abstractmethod
    def draw(self, path: Path, results: Results, title: str) -> None:
        """The figure of a comparison, as a PNG file written atomically."""

    def summaries(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """What `draw` reads of the summaries, one a seed, from an `entry` of results.json.

        Raises:
            UserError: results.json does not hold enough; so it is by default.
        """
        raise UserError(
            f"figures of {self.command} are not drawn from results.json alone; give the study's "
            "command again, which reads its finished runs"
        )

    @abstractmethod
    def title(self, config: Any, shared: Any) -> str:
        """What the numbers are about: data, order, network."""

    def chance(self, config: Any, shared: Any) -> float | None:
        """The accuracy of guesses, in 0..1, for figures; None where numbers are no accuracies.

        A run's summary has it as `chance`.

        Args:
            config: the settings.
            shared: see `load`.
        """
        return None

    def exporter(self) -> Exporter:
        """What makes the networks of its runs again, for `dynmoe export`.

        Raises:
            UserError: there is nothing that does; so it is by default.
        """
        raise UserError(f"networks of {self.command} cannot be exported")

    def report_folder(self, preset: str, config: RunConfig, first: Path) -> Path:
        """Where the results of a command line go; `first` is the main run's folder."""
        return first

    def report_more(self, folder: Path, config: Any, shared: Any, results: Results) -> None:  # noqa: B027
        """Draw and print what only this command has; results.json and the table are there."""


@dataclass(frozen=True)
class Results:
    """Finished runs. Where metric or part are not named, they are the experiment's.

    Intervals of differences have the level of `family`: 95 % by default; a study's verdict is given
    a family of the size of all its comparisons.
    """

    runs: dict[str, dict[str, list[dict[str, Any]]]]
    """stream -> variant -> summaries, one per seed"""
    folders: dict[str, dict[str, list[Path]]]
    """stream -> variant -> run folders, one per seed"""
    experiment: Experiment
    family: Family = field(default_factory=Family, compare=False)
    chance: dict[str, float] = field(default_factory=dict, compare=False)
    """stream -> the accuracy of guesses, 0..1, where it is known; figures show it"""

    @property
    def streams(self) -> list[str]:
        """Names, in order."""
        return list(self.runs)

    @property
    def variants(self) -> list[str]:
        """Names over all streams, in the order in which they come; a color each in figures."""
        return list(dict.fromkeys(v for variants in self.runs.values() for v in variants))

    def values(
        self, stream: str, variant: str, metric: str = "", at: At | None = None
    ) -> list[float]:
        """[S] one number per seed.

        Raises:
            UserError: no such stream, variant or part.
        """
        if stream not in self.runs:
            raise unknown("stream", stream, self.runs)
        if variant not in self.runs[stream]:
            raise unknown(f"variant on stream {stream!r}", variant, self.runs[stream])
        if at is not None and at not in get_args(At):
            raise unknown("part of a run, at", at, get_args(At))
        runs = self.runs[stream][variant]
        metric, at = metric or self.experiment.metric, at or self.experiment.at
        return [self.experiment.value(run, metric, at) for run in runs]

    def scalars(self, stream: str, variant: str, tag: str) -> list[list[float]]:
        """[S][points] of a tag in the runs' logs, in order of time."""
        return [logged(folder, tag) for folder in self.folders[stream][variant]]

    def difference(
        self, stream: str, a: str, b: str, metric: str = "", at: At | None = None
    ) -> Interval:
        """Mean of a - b over seeds, paired by seed, with its t interval at the family's level.

        nan where a run lacks the metric.
        """
        key = (stream, a, b, metric or self.experiment.metric, at or self.experiment.at)
        ones, others = (self.values(stream, v, metric, at) for v in (a, b))
        return self.gap(ones, others, key)

    def gap(
        self, ones: Sequence[float], others: Sequence[float], key: Hashable | None = None
    ) -> Interval:
        """The same of any two numbers of each seed, `[S]` each: for what is no metric.

        `key` says what is compared, see `Family.difference`.
        """
        if _lacking([*ones, *others]):
            return _UNKNOWN
        return self.family.difference(ones, others, key)

    def says(self, stream: str, a: str, b: str, metric: str = "", at: At | None = None) -> str:
        """One sentence: is a above b on this stream? The interval decides."""
        gap, where = self.difference(stream, a, b, metric, at), f"{stream}: " if stream else ""
        ones, others = (self.values(stream, v, metric, at) for v in (a, b))
        if _lacking(ones + others):
            return f"{where}{a} against {b}: not measured ({metric.replace('_', ' ')})."
        chance = probability_of_improvement(ones, others)
        needed = seeds_to_see(ones, others, self.family.confidence)
        metric, at = metric or self.experiment.metric, at or self.experiment.at
        factor, unit, digits = self.experiment.unit(metric)
        low, high = factor * gap.low, factor * gap.high
        word = gap.verdict("higher", "lower", "no difference seen")
        more = f"; {needed} seeds to see it" if low <= 0 <= high and needed else ""
        about = self.experiment.describe(metric, at)
        return (
            f"{where}{a} against {b}: {factor * gap.point:+.{digits}f}{unit} "
            f"[{low:.{digits}f}, {high:.{digits}f}], {word} ({about}; "
            f"higher with probability {chance.point:.2f}{more})."
        )

    def kept(self, stream: str, variant: str, metric: str = "") -> str:
        """One sentence: does a variant hold its first level to the end of the stream?"""
        metric = metric or self.experiment.metric
        first, last = (self.values(stream, variant, metric, at) for at in ("first", "last"))
        if _lacking(first + last):
            return f"{stream}: {variant}: not measured ({metric.replace('_', ' ')})."
        gap = self.gap(last, first)
        factor, unit, digits = self.experiment.unit(metric)
        point, low, high = (factor * x for x in gap)
        word = gap.verdict("rises", "falls", "no change seen")
        return (
            f"{stream}: {variant} from {self.experiment.span}: {point:+.{digits}f}{unit} "
            f"[{low:.{digits}f}, {high:.{digits}f}], {word} ({metric.replace('_', ' ')})."
        )

    def interval(
        self, stream: str, variant: str, metric: str = "", at: At | None = None
    ) -> Interval:
        """Mean over seeds with its 95 % t interval; nan where a run lacks the metric."""
        values = self.values(stream, variant, metric, at)
        return _UNKNOWN if _lacking(values) else confidence_interval(values, "mean")


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def _lacking(values: list[float]) -> bool:
    """Whether a run has no number for a metric."""
    return any(map(math.isnan, values))


def logged(folder: Path, tag: str) -> list[float]:
    """All values of one tag in a run's log, in order; missing numbers are left out."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        value = json.loads(line).get(tag)
        if isinstance(value, int | float):
            found.append(float(value))
    return found

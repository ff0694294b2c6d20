"""Finished runs of any command, found below folders and sorted into streams, variants and seeds.

A run that cannot be read is left out, and told of: it stops nobody from seeing the others.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynmoe.errors import unknown
from dynmoe.lab.experiment import Details, Experiment
from dynmoe.lab.results import read_run

Runs = dict[str, dict[str, dict[int, "FinishedRun"]]]
"""stream -> variant -> seed -> run"""
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What broken files raise."""
MOST_IN_LABEL = 4
"""Settings that a label names; of more it is a number, and the table of settings says the rest."""


@dataclass(frozen=True)
class Command:
    """What is to be known of a command to read its runs."""

    experiment: Experiment
    """says what the numbers of its runs are"""
    placed: frozenset[str]
    """settings that say where or how a run is kept, and so nothing of its numbers"""


Commands = Mapping[str, Callable[[], Command]]
"""Name -> what brings the command, asked only if there is a run of it."""


@dataclass(frozen=True)
class FinishedRun:
    """A run with all that a page shows of it."""

    folder: Path
    """its own"""
    command: str
    """cl, rl, tta or dg"""
    seed: int
    """what its random numbers flow from"""
    settings: dict[str, Any]
    """those that decide its numbers, but for the seed; of parts with a dot: `router.temperature`"""
    summary: dict[str, Any]
    """as the run left it"""
    details: Details
    """curves, growths, cost"""
    sessions: list[dict[str, Any]]
    """versions, commit and device, of each time that it was started or went on"""


@dataclass(frozen=True)
class Group:
    """Runs that are told together: all those of a command, or a study's."""

    title: str
    """the command's or the study's name"""
    experiment: Experiment
    """says what the numbers are"""
    runs: Runs
    """streams and variants in the order in which they came"""
    question: str = ""
    """a study's"""
    verdict: list[str] = field(default_factory=list)
    """a study's own sentences"""

    @property
    def variants(self) -> list[str]:
        """Names over all streams, in order; a color each in figures."""
        return list(dict.fromkeys(v for variants in self.runs.values() for v in variants))


@dataclass(frozen=True)
class LeftOut:
    """What was asked for and is not shown."""

    folder: str
    reason: str

    def __str__(self) -> str:
        return f"{self.folder} left out: {self.reason}"


class NotShownError(Exception):
    """Why a run is left out."""


class Collection:
    """Runs found below folders, by `add`.

    Args:
        commands: those whose runs can be read.
        runs_dir: where runs that a study names are looked for, beside the study's own place.

    Attributes:
        left_out: what could not be read, in order.
    """

    def __init__(self, commands: Commands, runs_dir: Path) -> None:
        self.commands, self.runs_dir = commands, runs_dir
        self.left_out: list[LeftOut] = []
        self._known: dict[str, Command] = {}
        self._runs: dict[Path, FinishedRun] = {}
        self._studies: dict[Path, Group] = {}

    def add(self, path: Path) -> None:
        """A run's folder, a folder above runs, or one with the results of a study or a sweep."""
        path = path.parent if path.name == "results.json" else path
        if not path.is_dir():
            self._leave_out(path, "no such folder")
        elif (study := _study_results(path)) is not None:
            self._add_study(path, study)
        else:
            folders = run_folders(path)
            if not folders:
                self._leave_out(path, "no run in it")
            for folder in folders:
                self._add_run(folder)

    def groups(self) -> list[Group]:
        """A group for each command and each study that has runs, in the order of the commands."""
        by_command: dict[str, list[FinishedRun]] = {name: [] for name in self.commands}
        for run in self._runs.values():
            by_command[run.command].append(run)
        groups = [self._group(name, runs) for name, runs in by_command.items() if runs]
        return groups + list(self._studies.values())

    def _add_run(self, folder: Path) -> None:
        if folder.resolve() not in self._runs:
            run = self._read(folder)
            if run is not None:
                self._runs[folder.resolve()] = run

    def _add_study(self, path: Path, study: dict[str, Any]) -> None:
        """The runs that a study's results name; those of one that is told twice count once."""
        if path.resolve() in self._studies:
            return
        places = [Path(os.path.normpath(path / ".." / "..")), self.runs_dir]
        runs: Runs = {}
        try:
            first = int(study.get("first_seed", 0))  # older ones do not say it
            seeds = range(first, first + int(study["seeds"]))
            for stream, variants in study["streams"].items():
                for variant, entry in variants.items():
                    for seed in seeds:
                        folder = self._find(str(entry["runs"]), seed, places)
                        run = None if folder is None else self._read(folder)
                        if run is not None:
                            own = runs.setdefault(printable(stream), {})
                            own.setdefault(printable(variant), {})[seed] = run
            verdict = [printable(sentence) for sentence in study["verdict"]]
        except UNREADABLE as error:
            self._leave_out(path, f"results.json cannot be read: {_line(error)}")
            return
        commands = {
            r.command for own in runs.values() for seeds in own.values() for r in seeds.values()
        }
        if len(commands) == 1:
            experiment = self._command(commands.pop()).experiment
            question = printable(" ".join(str(study.get("question", "")).split()))
            group = Group(printable(study["study"]), experiment, runs, question, verdict)
            self._studies[path.resolve()] = group
        else:
            self._leave_out(path, "its runs are not there" if not runs else "of several commands")

    def _find(self, name: str, seed: int, places: Sequence[Path]) -> Path | None:
        """The folder of a study's run."""
        if name not in ("", ".", "..") and Path(name).name == name:
            for place in dict.fromkeys(places):
                for command in self.commands:
                    folder = place / command / "studies" / name / f"seed-{seed}"
                    if folder.is_dir():
                        return folder
        self._leave_out(Path(f"{name}/seed-{seed}"), f"not below {places[0]}")
        return None

    def _read(self, folder: Path) -> FinishedRun | None:
        """The run in a folder; None, and told of, if it cannot be shown."""
        try:
            return self._read_files(folder)
        except NotShownError as error:
            self._leave_out(folder, str(error))
        except UNREADABLE as error:
            self._leave_out(folder, f"cannot be read: {_line(error)}")
        return None

    def _read_files(self, folder: Path) -> FinishedRun:
        if not (folder / "config.json").is_file():
            raise NotShownError("no config.json: it never began")
        if not (folder / "summary.json").is_file():
            raise NotShownError("not finished: no summary.json")
        row = read_run(folder)
        summary = json.loads((folder / "summary.json").read_text())
        sessions = json.loads((folder / "environment.json").read_text())["sessions"]
        if row.command not in self.commands:
            known = ", ".join(self.commands)
            raise NotShownError(f"in the folder of none of the commands {known}")
        command = self._command(row.command)
        own = {k: v for k, v in row.settings.items() if k.split(".")[0] not in command.placed}
        own.pop("seed")
        try:
            details = _check(command.experiment, summary, sessions)
        except (*UNREADABLE, ArithmeticError, AssertionError) as error:
            raise NotShownError(f"no summary of {row.command}: {_line(error)}") from None
        return FinishedRun(folder, row.command, row.seed, own, summary, details, sessions)

    def _group(self, name: str, runs: list[FinishedRun]) -> Group:
        """Runs of one command, by what they are about and by their other settings."""
        experiment = self._command(name).experiment
        about: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for run in runs:
            parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
            for key, value in run.settings.items():
                parts[key.split(".")[0] not in experiment.about][key] = value
            about.append(parts[0])
            rest.append(parts[1])
        _add_data_sets(about, [run.summary.get("dataset") for run in runs])
        streams = label_all(about, ["" for _ in runs])
        variants = label_all(rest, [printable(run.summary.get("method", name)) for run in runs])
        found: Runs = {}
        for run, stream, variant in zip(runs, streams, variants, strict=True):
            seeds = found.setdefault(stream, {}).setdefault(variant, {})
            if run.seed in seeds:
                other = seeds[run.seed].folder
                self._leave_out(run.folder, f"same settings and seed as {other}")
            else:
                seeds[run.seed] = run
        return Group(name, experiment, found)

    def _command(self, name: str) -> Command:
        if name not in self._known:
            self._known[name] = self.commands[name]()
        return self._known[name]

    def _leave_out(self, folder: Path, reason: str) -> None:
        left = LeftOut(printable(folder), printable(reason))
        if left not in self.left_out:
            self.left_out.append(left)


def with_first(groups: list[Group], variant: str) -> list[Group]:
    """The groups with this variant first wherever there is one of this name; "" for no change.

    Raises:
        UserError: there is none anywhere.
    """
    known = list(dict.fromkeys(name for group in groups for name in group.variants))
    if variant and variant not in known:
        raise unknown("variant", variant, known)
    return [replace(group, runs=_put_first(group.runs, variant)) for group in groups]


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else those of all runs below it, sorted."""
    found = []
    for place, folders, files in os.walk(path):
        name = Path(place).name
        if "config.json" in files or "summary.json" in files or re.fullmatch(r"seed-\d+", name):
            found.append(Path(place))
            folders.clear()  # what a run keeps is no run
    return sorted(found)


def label_all(settings: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A label for each of some settings, equal where they are equal.

    Args:
        settings: flat, one for each run.
        names: what the labels begin with; where all settings of a name are equal, it is the label.

    Returns:
        name, and the settings in which those of its name differ; a number if these are many.
    """
    keys = [json.dumps(one, sort_keys=True) for one in settings]
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for name, key, one in zip(names, keys, settings, strict=True):
        by_name.setdefault(name, {})[key] = one
    labels = {}
    for name, own in by_name.items():
        changed = differing(list(own.values()))
        for number, (key, one) in enumerate(own.items(), start=1):
            told = [f"{_short(k)} {show(one[k])}" for k in changed if k in one]
            more = ", ".join(told) if len(changed) <= MOST_IN_LABEL else f"setting {number}"
            labels[name, key] = " ".join(filter(None, [name, more]))
    return [labels[pair] for pair in zip(names, keys, strict=True)]


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all, or missing in some; sorted."""
    keys = sorted({key for one in settings for key in one})
    return [k for k in keys if len({json.dumps(one.get(k, "?")) for one in settings}) > 1]


def show(value: Any) -> str:
    """A setting's value in a few words."""
    if isinstance(value, list):
        return " ".join(map(show, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return printable(value)


def printable(value: Any) -> str:
    """A text from a file, without what no page can show; names may hold anything."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def number(experiment: Experiment, run: FinishedRun, metric: str, at: Any) -> float:
    """A metric of a run; nan where it has none."""
    value = float(experiment.value(run.summary, metric, at))
    return value if math.isfinite(value) else math.nan


def _check(experiment: Experiment, summary: Any, sessions: Any) -> Details:
    """What a page shows of a run, once all that will be asked of its files has been tried.

    Raises:
        one of `UNREADABLE`, and others: something is not what the command writes.
    """
    for _, metric, at in (*experiment.columns, ("", experiment.metric, experiment.at)):
        float(experiment.value(summary, metric, at))
    for session in sessions:
        dict(session["packages"])
    details = experiment.details(summary)
    for event in details.growths:
        int(event["step"]), int(event["experts"]), int(event["parameters"])
    for value in details.cost.values():
        float(value)
    return details


def _add_data_sets(about: list[dict[str, Any]], names: list[Any]) -> None:
    """Tell runs apart whose settings, such as `auto`, agree while their data sets do not."""
    keys = [json.dumps(one, sort_keys=True) for one in about]
    found: dict[str, set[str]] = {}
    for key, name in zip(keys, names, strict=True):
        found.setdefault(key, set()).add(str(name))
    for one, key, name in zip(about, keys, names, strict=True):
        if len(found[key]) > 1:
            one["data set"] = name


def _put_first(runs: Runs, variant: str) -> Runs:
    return {
        stream: {name: own[name] for name in sorted(own, key=lambda name: name != variant)}
        for stream, own in runs.items()
    }


def _study_results(path: Path) -> dict[str, Any] | None:
    """What is in results.json of a study or a sweep; None if the folder is none of such a one."""
    try:
        found = json.loads((path / "results.json").read_text())
    except UNREADABLE:
        return None
    return found if isinstance(found, dict) and "study" in found else None


def _short(key: str) -> str:
    return printable(key.removesuffix(".part"))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

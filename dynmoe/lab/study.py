"""A study: variants of a command on streams, and a verdict computed from their numbers.

A sweep is a study whose variants are given on the command line.
"""

from __future__ import annotations

import inspect
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from dynmoe.errors import UserError
from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.figures import VECTORS, told_chance
from dynmoe.lab.files import write_atomic, write_json, writing
from dynmoe.lab.launchers import Launcher
from dynmoe.lab.markdown import cell
from dynmoe.lab.report import beside, caption, entry, print_table, table
from dynmoe.lab.runner import Job, plan, results_of, run_jobs, settings_in
from dynmoe.lab.statistics import Family
from dynmoe.registry import Part

Preset = Literal["laptop", "paper"]
Command = Literal["cl", "rl", "tta", "dg"]
SEARCH_SEED = 1000
"""Searches use seeds that no reported run has, from this one on."""
ALL_AT_ONCE = (
    "These are {count} comparisons: each interval has a level of {level} % (Bonferroni), so that "
    "all of them hold at once with 95 %. Those in tables are 95 % intervals of one number."
)
FEW_SEEDS = (
    "Intervals are t intervals, wide at {seeds} seeds: what is not seen may be there. Where "
    "N seeds are said to see it, a difference of the size found would show at N with a chance of "
    "80 %, as far as these seeds can tell."
)
TWO_SEEDS = (
    "Of two seeds an interval reaches 12.7 standard errors to each side: it sees next to nothing."
)


class Study(Part, ABC, kind="study"):
    """Base of all studies. The first line of a study's docstring is its question.

    Attributes:
        command: whose runs are compared.
        start: preset -> flags of all its runs.
        on: stream -> flags of all runs on it.
        seeds: for each preset.
        searched_on: stream whose searches decide for all streams; None: each stream has its own.
            Where it is not run, `variants` stand.
        search_seeds: seeds of each choice in a search, from SEARCH_SEED on.
        search_metric: what a search looks at, its mean; the experiment's if "".
        tags: (title, tag) of scalars in the runs' logs that are kept beside the accuracies.
    """

    command: ClassVar[Command] = "cl"
    start: ClassVar[dict[Preset, str]] = {"laptop": "--dataset fractal", "paper": "--preset paper"}
    on: ClassVar[dict[str, str]] = {"class": "--protocol class", "shuffle": "--protocol shuffle"}
    seeds: ClassVar[dict[Preset, int]] = {"laptop": 3, "paper": 5}
    tags: ClassVar[tuple[tuple[str, str], ...]] = ()
    searched_on: ClassVar[str | None] = None
    search_seeds: ClassVar[int] = 1
    search_metric: ClassVar[str] = ""

    def streams(self, preset: Preset) -> dict[str, str]:
        """Stream -> flags of all runs on it."""
        return {stream: f"{self.start[preset]} {own}".strip() for stream, own in self.on.items()}

    @abstractmethod
    def variants(self, preset: Preset) -> dict[str, str]:
        """Variant -> its own flags."""

    def variants_on(self, stream: str, preset: Preset) -> dict[str, str]:
        """Those of one stream; all unless defined."""
        return self.variants(preset)

    @abstractmethod
    def verdict(self, results: Results) -> list[str]:
        """Sentences that follow from the numbers, each with its interval."""

    def flags_on(self, stream: str, flags: str) -> str:
        """A variant's flags on one stream; as they are unless defined."""
        return flags

    def shared_flags(self, own: str, flags: list[str]) -> list[str]:
        """Flags of all runs on a stream: its own, as far as those of the command line leave them.

        A part that the latter name stands in place of the stream's own with its options.
        """
        return [*without(shlex.split(own), flags), *flags]

    def experiment(self, own: Experiment) -> Experiment:
        """What the command does; with other columns of the tables where a study defines it."""
        return own

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Variant -> flags to choose among before the seeds are run; none unless defined."""
        return {}

    def score(self, experiment: Experiment, summary: dict[str, Any]) -> float:
        """What a search wants much of, of one run; the mean of its metric unless defined."""
        return experiment.value(summary, self.search_metric or experiment.metric, "mean")

    def draw(self, path: Path, results: Results, title: str) -> None:
        """The figure, a PNG file written atomically; the experiment's unless defined."""
        results.experiment.draw(path, results, title)


def check_preset(study: Study, preset: str) -> None:
    """Refuse a preset for which a study of somebody's own gives no flags or no seeds.

    Raises:
        UserError: names what is lacking.
    """
    for what, given in (("start", study.start), ("seeds", study.seeds)):
        if preset not in given:
            raise UserError(
                f"study {study.name} has no preset {preset!r}: its {what} names "
                f"{', '.join(given)} only; use one of these, or add {preset!r} to {what}"
            )


def run_study(
    study: Study,
    experiment: Experiment,
    presets: dict[str, Any],
    flags: list[str],
    seeds: range,
    launcher: Launcher,
    runs_dir: Path,
    out: Path,
    command: str,
    preset: Preset = "laptop",
    only: tuple[str, ...] = (),
    retries: int | None = None,
) -> Results:
    """Choose settings where the study searches, run all seeds, and write the results.

    Args:
        study: the question.
        experiment, presets: the command that it is about.
        flags: more flags for every run, for instance to shorten it; see `Study.shared_flags`.
        seeds: those of each variant.
        launcher: where runs are carried out.
        runs_dir: where run folders are made.
        out: where results, figure and page go.
        command: the command line that makes all this again.
        preset: of the study.
        only: streams to run; all where none are named.
        retries: see `try_jobs`; None: the first failure stops the runs not begun.

    Raises:
        UserError: flags that do not fit, an unknown stream, or another process writes to `out`.
    """
    experiment = study.experiment(experiment)
    streams = _chosen(study, preset, only)

    def planned(own: str, base: list[str], chosen: list[int], label: str) -> list[Job]:
        argv = [*shlex.split(own), *base]
        return plan(experiment, presets, argv, chosen, runs_dir, label)

    bases = {stream: study.shared_flags(own, flags) for stream, own in streams.items()}
    variants = _variants(study, preset, planned, bases, launcher)
    labels = {stream: f"{stream}, " if stream else "" for stream in variants}
    planned_jobs = {
        stream: {v: planned(own, bases[stream], list(seeds), labels[stream] + v)
                 for v, own in chosen.items()}
        for stream, chosen in variants.items()
    }  # fmt: skip
    by_variant = [own for chosen in planned_jobs.values() for own in chosen.values()]
    turns = [job for turn in zip(*by_variant, strict=True) for job in turn]
    with writing(out):
        run_jobs(turns, launcher, study.name, retries or 0, keep_going=retries is not None)
        results = results_of(planned_jobs, experiment)
        _report(study, command, seeds, variants, results, out)
    return results


def _chosen(study: Study, preset: Preset, only: tuple[str, ...]) -> dict[str, str]:
    """The study's streams, or some of them.

    Raises:
        UserError: there is no such stream.
    """
    streams = study.streams(preset)
    unknown = [name for name in only if name not in streams]
    if unknown:
        raise UserError(
            f"study {study.name} has no stream {unknown[0]!r} here; it has {', '.join(streams)}"
        )
    return {name: own for name, own in streams.items() if not only or name in only}


def without(own: list[str], flags: list[str]) -> list[str]:
    """A study's flags without the parts, and their options, that other flags name."""
    named = {name for name in settings_in(flags) if "." not in name}
    kept, keep = [], True
    for word in own:
        if word.startswith("--"):
            keep = not settings_in([word.split(".")[0]]) & named
        if keep:
            kept.append(word)
    return kept


def _variants(
    study: Study,
    preset: Preset,
    planned: Callable[[str, list[str], list[int], str], list[Job]],
    bases: dict[str, list[str]],
    launcher: Launcher,
) -> dict[str, dict[str, str]]:
    """Stream -> variant -> flags, the best ones where the study searches."""
    common: dict[str, str] = {}
    if study.searched_on in bases:
        base = bases[study.searched_on]
        common = _search(study, preset, planned, study.searched_on, base, launcher)
    variants = {}
    for stream, base in bases.items():
        found = study.variants_on(stream, preset) | common
        if study.searched_on is None:
            found |= _search(study, preset, planned, stream, base, launcher)
        variants[stream] = {v: study.flags_on(stream, own) for v, own in found.items()}
    return variants


def _search(
    study: Study,
    preset: Preset,
    planned: Callable[[str, list[str], list[int], str], list[Job]],
    stream: str,
    base: list[str],
    launcher: Launcher,
) -> dict[str, str]:
    """The best flags of each variant that is searched, by the metric's mean on seeds apart."""
    seeds = list(range(SEARCH_SEED, SEARCH_SEED + study.search_seeds))
    trials = {
        label: {own: planned(own, base, seeds, f"{stream}, {label} of {own}") for own in choices}
        for label, choices in study.searches(preset).items()
    }
    run_jobs(
        [job for t in trials.values() for own in t.values() for job in own], launcher, "search"
    )

    def score(own: list[Job]) -> float:
        return sum(study.score(job.experiment, job.summary()) for job in own)

    return {label: max(t, key=lambda own: score(t[own])) for label, t in trials.items()}


def judge(study: Study, results: Results) -> tuple[list[str], int]:
    """The study's verdict, and the comparisons that it makes, for whose number it is corrected.

    The verdict is asked twice: to count its comparisons, and with the intervals that hold for all.

    Raises:
        UserError: it asks for a stream, variant or part of the runs that is not there, or returns
            no list of sentences.
    """
    counted = replace(results, family=Family())
    said = study.verdict(counted)
    if not isinstance(said, list) or not all(isinstance(sentence, str) for sentence in said):
        raise UserError(f"study {study.name}: verdict must return a list of strings, not {said!r}")
    comparisons = max(1, len(counted.family.made))
    return study.verdict(replace(results, family=Family(comparisons))), comparisons


def _report(
    study: Study,
    command: str,
    seeds: range,
    variants: dict[str, dict[str, str]],
    results: Results,
    out: Path,
) -> None:
    """Write everything to `out`, and print the tables and the verdict."""
    verdict, comparisons = judge(study, results)
    commits, count = _commits(results), len(seeds)
    if comparisons > 1 and count > 1:
        level = f"{100 * Family(comparisons).confidence:.2f}"
        verdict.append(ALL_AT_ONCE.format(count=comparisons, level=level))
    if count < 10:
        verdict.append(FEW_SEEDS.format(seeds=count))
    if count == 2:
        verdict.append(TWO_SEEDS)
    streams = {
        stream: {
            variant: {"flags": flags, **entry(results, stream, variant),
                      **_logged(study, results, stream, variant)}
            for variant, flags in chosen.items()
        }
        for stream, chosen in variants.items()
    }  # fmt: skip
    question = inspect.getdoc(study) or ""
    write_json(out / "results.json", {
        "study": study.name, "question": question, "command": command, "commits": commits,
        "seeds": count, "first_seed": seeds.start, "comparisons": comparisons, "verdict": verdict,
        "streams": streams,
        **({"chance": results.chance} if results.chance else {}),
        **beside(results),
    })  # fmt: skip
    before = VECTORS.set(True)
    try:
        told = f"{study.name} ({count} seeds{told_chance(results.chance.values())})"
        study.draw(out / "figure.png", results, told)
    finally:
        VECTORS.reset(before)
    lines = [f"# {study.name}", "", question, "", "```bash", command, "```", ""]
    about = caption(results.experiment, count)
    lines += [f"{about[0].upper()}{about[1:]}; runs made on commit {', '.join(commits)}.", ""]
    for stream, chosen in variants.items():
        rows = table(results, stream)
        heading = ": ".join(filter(None, [study.name, stream]))
        print_table(heading, rows, about, results.experiment.lesser)
        marked = [f"`{flags}`" if flags else "" for flags in chosen.values()]
        ends = ["flags", "---", *marked]
        ends += [""] * (len(rows) + 1 - len(ends))  # of what stands beside the runs
        rows.insert(1, ["---"] * len(rows[0]))
        lines += [f"## {stream}", ""] if stream else []
        rows = [[cell(text) for text in [*r, end]] for r, end in zip(rows, ends, strict=True)]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += ["## Verdict", "", *(f"- {sentence}" for sentence in verdict), ""]
    lines += [f"![{study.name}](figure.png)", ""]
    write_atomic(out / "study.md", "\n".join(lines).encode())
    for sentence in verdict:
        print(f"- {sentence}")
    print(f"results: {out}")


def _logged(study: Study, results: Results, stream: str, variant: str) -> dict[str, Any]:
    """What the runs have logged under the study's tags: [S][points] each."""
    return {
        title: [[round(x, 4) for x in seed] for seed in results.scalars(stream, variant, tag)]
        for title, tag in study.tags
    }


def _commits(results: Results) -> list[str]:
    """The commits that the runs were made on, sorted; of unknown ones "?"."""
    found = set()
    for variants in results.folders.values():
        for folder in (f for folders in variants.values() for f in folders):
            sessions = json.loads((folder / "environment.json").read_text())["sessions"]
            found |= {session["commit"] or "?" for session in sessions}
    return sorted(found)

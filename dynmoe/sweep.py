"""`python -m dynmoe.sweep`: a command over variants, a grid of settings and seeds, compared.

    python -m dynmoe.sweep cl --seeds 5
        --variants "dense: --method dense" "g2: --granularity 2" -- --protocol class
    python -m dynmoe.sweep rl --seeds 0..9 --grid "granularity: 1 2 4" "lr: 1e-4 1e-3" --dry-run

Flags after `--` go to every run. Each run has a folder named after its settings: finished runs are
read, unfinished runs resumed. A run that fails is tried again when the others are done. Results go
to runs/sweep/NAME.
"""

from __future__ import annotations

import hashlib
import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dynmoe.commands import begin, load
from dynmoe.errors import UserError
from dynmoe.lab.config import check_name, run_command
from dynmoe.lab.options import OF_RUNS, read_options
from dynmoe.ranges import check_settings

begin("sweep", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.engines import Where  # noqa: E402
from dynmoe.lab.experiment import At, Results  # noqa: E402
from dynmoe.lab.forecast import print_forecast  # noqa: E402
from dynmoe.lab.launchers import Launcher, Local  # noqa: E402
from dynmoe.lab.runner import plan, settings_in  # noqa: E402
from dynmoe.lab.space import split_words  # noqa: E402
from dynmoe.lab.study import Command, Preset, Study, run_study  # noqa: E402

__all__ = ["Config", "Sweep", "main", "sweep"]

DEFAULT = {"dense": "--method dense", "g2": "--granularity 2"}
"""Variants of cl and rl where nothing is swept by name."""


@dataclass(frozen=True, kw_only=True)
class Config(Where):
    """Settings of a sweep."""

    command: Annotated[Command, tyro.conf.Positional] = "cl"
    """the command to run"""
    variants: tuple[str, ...] | None = None
    """what is compared, each as "label: flags"; the others are told against the first. Without any,
    the choices of the grid are compared, and without a grid dense and g2"""
    grid: tuple[str, ...] = ()
    """settings, each as "name: values", such as "protocol: class noise"; the variants are compared
    at each choice of values"""
    name: str | None = None
    """names the folder of the results; none: the command and a hash of what is swept"""
    question: str = "What differs between these variants?"
    """what the sweep is to answer; it stands above the results"""
    seeds: str = "5"
    """seeds of each variant: N for 0 .. N-1, or first..last such as 10..19"""
    retries: int = 1
    """further attempts at a run that failed, after all others"""
    dry_run: bool = False
    """list the runs, which of them are finished, and what the others would cost; run nothing"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    debug: bool = False
    """show the traceback of an error"""


class Sweep(Study):  # not registered: it is made of a command line
    """What a command finds with each of several sets of flags.

    Args:
        name: of the folder of the results.
        chosen: variant -> its flags.
        grid: choice of the grid -> its flags; one without a name by default.
        question: what stands above the results.
        metric, at: what the verdict is about, and of which part of a run; by default the command's.
    """

    def __init__(
        self,
        name: str,
        chosen: dict[str, str],
        grid: dict[str, str] | None = None,
        question: str = Config.question,
        metric: str = "",
        at: At | None = None,
    ) -> None:
        self.name, self.chosen, self.grid = name, chosen, grid or {"": ""}  # type: ignore[misc]
        self.metric, self.at = metric, at
        self.__doc__ = question

    def streams(self, preset: Preset) -> dict[str, str]:
        """The choices of the grid; the flags of all runs are added to each."""
        return self.grid

    def shared_flags(self, own: str, flags: list[str]) -> list[str]:
        """All of both: the grid may set options of a part that the flags name."""
        return [*shlex.split(own), *flags]

    def variants(self, preset: Preset) -> dict[str, str]:
        """Those of the command line."""
        return self.chosen

    def verdict(self, results: Results) -> list[str]:
        """Each against the first, at each choice of the grid."""
        first, *others = self.chosen
        return [
            results.says(choice, other, first, self.metric, self.at)
            for choice in self.grid
            for other in others
        ]


def main(argv: list[str]) -> None:
    """Run what is not finished yet; write the results, the figure and the page.

    Raises:
        UserError: there are no variants, or a setting is out of range.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    config = read_options(Config, argv[:cut], "python -m dynmoe.sweep", __doc__, more=OF_RUNS)
    check_settings(config)
    check_name(config.name)
    launcher = config.make(config.runs_dir)
    if config.variants == ():
        raise UserError('--variants needs one or more, such as "g2: --granularity 2"')
    sweep(
        config.command,
        variants=read_variants(config.variants or ()),
        grid=read_grid(config.grid),
        flags=argv[cut + 1 :],
        seeds=read_seeds(config.seeds),
        name=config.name,
        question=config.question,
        launcher=launcher,
        retries=config.retries,
        runs_dir=config.runs_dir,
        dry_run=config.dry_run,
    )


def sweep(
    command: Command,
    *,
    variants: Mapping[str, str] | None = None,
    grid: Mapping[str, Sequence[object]] | None = None,
    flags: Sequence[str] = (),
    seeds: int | range = 5,
    name: str | None = None,
    question: str = Config.question,
    launcher: Launcher | None = None,
    retries: int = 1,
    runs_dir: Path = Path("runs"),
    dry_run: bool = False,
) -> Results | None:
    """Run a command with each variant, choice of the grid and seed, and compare them.

    With variants and a grid, each choice of the grid is a stream of the results. Finished runs are
    read. Where runs are processes of this machine, call it below `if __name__ == "__main__":`, as
    each imports the calling script.

    Args:
        command: cl, rl, tta or dg.
        variants: label -> flags, such as `{"dense": "--method dense"}`.
        grid: setting -> values, such as `{"granularity": [1, 2], "router": ["cosine", "topk"]}`.
        flags: of every run.
        seeds: their number from 0 on, or their range, without gaps.
        name: of the folder of the results, `runs_dir/sweep/NAME`; None: from what is swept.
        question: what the sweep is to answer; it stands above the results.
        launcher: where runs are carried out; None: one after another.
        retries: further attempts at a run that failed.
        runs_dir: where run folders are made.
        dry_run: print what it would cost, run nothing and return None.

    Raises:
        UserError: what does not fit, told before anything is run.
        DynmoeError: runs failed; the others are done.
    """
    chosen, at = choose(variants or {}, grid or {}, command)
    _check_named_once(chosen, at, flags)
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    if seeds.step != 1:
        raise UserError(f"seeds {seeds} have gaps; use a range with step 1")
    launcher = launcher or Local(1)
    words = _words(command, variants or {}, grid or {}, flags)
    name = name or f"{command}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    module = load(command)
    experiment, presets = module.experiment(), module.presets()
    if dry_run:
        planned = [
            plan(experiment, presets, [*shlex.split(own), *shlex.split(values), *flags],
                 list(seeds), runs_dir, ", ".join(filter(None, [choice, label])))
            for choice, values in at.items()
            for label, own in chosen.items()
        ]  # fmt: skip
        print_forecast([job for own in planned for job in own], runs_dir, launcher.jobs)
        return None
    return run_study(
        Sweep(name, chosen, at, question), experiment, presets, list(flags), seeds, launcher,
        runs_dir, runs_dir / "sweep" / name, _told(name, question, seeds, words), retries=retries,
    )  # fmt: skip


def choose(
    variants: Mapping[str, str], grid: Mapping[str, Sequence[object]], command: str
) -> tuple[dict[str, str], dict[str, str]]:
    """What is compared and where, each as label -> flags: variants, and choices of the grid.

    Without variants the choices of the grid are compared, in one place without a name.

    Raises:
        UserError: there is neither, and the command has no variants by default.
    """
    choices = {}
    settings = [[(key, str(value)) for value in values] for key, values in grid.items()]
    for picked in itertools.product(*settings):
        words = [word for key, value in picked for word in (f"--{key}", value)]
        choices[", ".join(f"{key} {value}" for key, value in picked)] = shlex.join(words)
    if variants:
        return dict(variants), choices
    if grid:
        return choices, {"": ""}
    if command not in ("cl", "rl"):
        raise UserError(
            f'nothing to sweep; give {command} --variants "label: flags" or --grid "name: values"'
        )
    return DEFAULT, {"": ""}


def _check_named_once(
    chosen: Mapping[str, str], at: Mapping[str, str], flags: Sequence[str]
) -> None:
    """Refuse a setting that is named in two places: one of its values would have no effect.

    Raises:
        UserError: names the setting and both places.
    """
    places = [
        *((f"variant {label!r}", own) for label, own in chosen.items()),
        *((f"the grid's {choice!r}", own) for choice, own in at.items()),
        ("the flags of all runs", shlex.join(flags)),
    ]
    named = [(place, settings_in(split_words(own, place))) for place, own in places]
    of_variants, of_grid = named[: len(chosen)], named[len(chosen) : -1]
    pairs = [
        *itertools.product(of_variants, of_grid),
        *((one, named[-1]) for one in (*of_variants, *of_grid)),
    ]
    for (place, own), (other, there) in pairs:
        if twice := sorted(own & there):
            raise UserError(
                f"{twice[0]} is in {place} and in {other}, so one of them would have no effect; "
                "name it in one place"
            )


def _told(name: str, question: str, seeds: range, words: str) -> str:
    """The command line that makes the results again; `words` say what is swept."""
    span = f"{len(seeds)}" if seeds.start == 0 else f"{seeds.start}..{seeds.stop - 1}"
    own = shlex.join(["--name", name, "--question", question, "--seeds", span])
    return f"python -m dynmoe.sweep {own} {words}"


def _words(
    command: str,
    variants: Mapping[str, str],
    grid: Mapping[str, Sequence[object]],
    flags: Sequence[str],
) -> str:
    """The part of the command line that says what is swept."""
    words = [command]
    if variants or not grid:
        words += ["--variants", *(f"{k}: {v}".strip() for k, v in (variants or DEFAULT).items())]
    if grid:
        words += ["--grid", *(f"{k}: {shlex.join(map(str, vs))}" for k, vs in grid.items())]
    return shlex.join([*words, "--", *flags])


def read_seeds(text: str) -> range:
    """The seeds that "5" or "0..4" names.

    Raises:
        UserError: it names none.
    """
    first, dots, last = text.partition("..")
    try:
        seeds = range(int(first), int(last) + 1) if dots else range(int(text))
    except ValueError:
        raise UserError(
            f"--seeds {text} is no number of seeds; use N for 0 .. N-1, or first..last"
        ) from None
    if not seeds or seeds.start < 0:
        raise UserError(f"--seeds {text} is too small; use 1 or more, or first..last such as 0..9")
    return seeds


def read_variants(texts: tuple[str, ...]) -> dict[str, str]:
    """Label -> flags.

    Raises:
        UserError: a variant that cannot be read or shown, or is named twice.
    """
    found = _pairs(texts, "variant", '"label: flags", such as "g2: --granularity 2"')
    for label in found:
        if label.startswith("_"):
            raise UserError(f"variant {label!r}: legends leave out what begins with _; rename it")
    return found


def read_grid(texts: tuple[str, ...]) -> dict[str, list[str]]:
    """Setting -> values.

    Raises:
        UserError: one that cannot be read, has no or equal values, or is named twice.
    """
    found = {}
    pairs = _pairs(texts, "setting", '"name: values", such as "granularity: 1 2 4"')
    for key, value in pairs.items():
        values = split_words(value, f"--grid {key!r}")
        if not values or len(set(values)) < len(values):
            raise UserError(f"--grid {key!r} needs one or more values, each once; got {value!r}")
        found[key.removeprefix("--")] = values
    return found


def _pairs(texts: tuple[str, ...], what: str, form: str) -> dict[str, str]:
    """What stands before and behind the first colon of each text."""
    chosen: dict[str, str] = {}
    for text in texts:
        label, colon, rest = text.partition(":")
        label = label.strip()
        if not colon or not label:
            raise UserError(f"{what} {text!r} must read {form}")
        if label in chosen:
            raise UserError(f"{what} {label!r} is named twice; name each once")
        chosen[label] = rest.strip()
    return chosen


if __name__ == "__main__":
    run_command(main)

"""`python -m dynmoe.search`: find the best settings by trials, and measure them on other seeds.

    python -m dynmoe.search cl --trials 20
        --space "lr: 1e-4 1e-2 log" "granularity: 1 2 4" -- --protocol class

Flags after `--` go to every run. Optuna (TPE) chooses the trials. They are kept in
runs/search/NAME/search.db: a search that was stopped goes on where it was. Trials have seeds from
1000 on. The best trial is run again on the seeds of --seeds, beside the settings without the
search. Only these numbers are reported: the best of many trials looks better than it is. A searched
setting among the flags is that of the runs without the search.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dynmoe.commands import begin, load
from dynmoe.errors import DynmoeError, NumericError, Pruned, UserError
from dynmoe.lab.config import check_name, run_command
from dynmoe.lab.options import OF_RUNS, read_options
from dynmoe.ranges import check_settings

begin("search", __name__)  # before imports that may fail

import tyro  # noqa: E402

from dynmoe.lab.early_stop import Series, bar, logged_series  # noqa: E402
from dynmoe.lab.engines import Where  # noqa: E402
from dynmoe.lab.experiment import At, Results  # noqa: E402
from dynmoe.lab.files import write_json, writing  # noqa: E402
from dynmoe.lab.launchers import Launcher  # noqa: E402
from dynmoe.lab.report import print_table  # noqa: E402
from dynmoe.lab.runner import Job, plan, settings_in, try_jobs  # noqa: E402
from dynmoe.lab.space import (  # noqa: E402
    Space,
    distributions,
    first_values,
    flags_of,
    read_space,
)
from dynmoe.lab.study import SEARCH_SEED, Command, run_study  # noqa: E402
from dynmoe.sweep import Sweep, read_seeds  # noqa: E402

if TYPE_CHECKING:
    import optuna

SHOWN = 10
"""Trials in the table."""


QUESTION = "Is the best trial of a search better than the settings without it, on other seeds?"


@dataclass(frozen=True, kw_only=True)
class Config(Where):
    """Settings of a search."""

    command: Annotated[Command, tyro.conf.Positional] = "cl"
    """the command to run"""
    space: tuple[str, ...] = ()
    """what is searched, each as "name: low high log", "name: low high uniform" or "name: values"
    """
    trials: int = 20
    """trials in all, those of earlier calls counted in"""
    metric: str = ""
    """what the search wants much of; by default what the command's verdicts are about, but for dg
    the accuracy that its --selection goes by: the left-out domain must not choose settings"""
    at: At | None = None
    """part of the run that it is taken from; by default the command's own"""
    minimize: bool = False
    """want little of the metric instead"""
    prune: str = ""
    """tag of a logged number, such as task/train_accuracy: a trial that has less of it than the
    median of the trials before at the same step is stopped; none: every trial is a whole run"""
    search_seeds: int = 1
    """seeds of each trial, from 1000 on; its value is their mean"""
    seeds: str = "5"
    """seeds that the best trial is reported on: N for 0 .. N-1, or first..last"""
    name: str | None = None
    """names the folder of the results; none: the command and a hash of what is searched"""
    retries: int = 1
    """further attempts at a run that was killed"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(frozen=True)
class Search:
    """What is searched; `about` tells one search from another."""

    config: Config
    flags: list[str]
    space: Space
    launcher: Launcher

    @property
    def metric(self) -> str:
        """What is searched for, where it is not what the command's verdicts are about."""
        return self.config.metric or load(self.config.command).experiment().search_metric

    @property
    def about(self) -> str:
        """All that decides the trials, as one would type it."""
        c = self.config
        words = [c.command, "--space", *c.space]
        words += ["--metric", self.metric] if self.metric else []
        words += ["--at", c.at] if c.at else []
        words += ["--minimize"] if c.minimize else []
        words += ["--prune", c.prune] if c.prune else []
        words += ["--search-seeds", str(c.search_seeds)] if c.search_seeds > 1 else []
        return shlex.join([*words, "--", *self.flags])

    def plan(self, values: dict[str, Any], label: str) -> list[Job]:
        """The runs of one trial.

        Raises:
            UserError: settings that do not fit each other.
        """
        module = load(self.config.command)
        argv = [*self.flags, *shlex.split(flags_of(values))]
        seeds = list(range(SEARCH_SEED, SEARCH_SEED + self.config.search_seeds))
        runs_dir = self.config.runs_dir
        return plan(module.experiment(), module.presets(), argv, seeds, runs_dir, label)

    def value(self, jobs: list[Job]) -> float:
        """Mean of the metric over the runs of a trial.

        Raises:
            UserError: runs of this command have no such number.
        """
        experiment, found = jobs[0].experiment, []
        metric, at = self.metric or experiment.metric, self.config.at or experiment.at
        for job in jobs:
            try:
                found.append(experiment.value(job.summary(), metric, at))
            except (KeyError, TypeError):
                found.append(math.nan)
        if any(map(math.isnan, found)):
            raise UserError(
                f"{jobs[0].folder} has no number for --metric {metric} --at {at}; its summary.json "
                "holds those that there are"
            )
        return sum(found) / len(found)


def main(argv: list[str]) -> None:
    """Make the trials that are missing; report the best on other seeds.

    Raises:
        UserError: a setting is out of range.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    config = read_options(Config, argv[:cut], "python -m dynmoe.search", __doc__, more=OF_RUNS)
    check_settings(config)
    check_name(config.name)
    for setting, least in {"trials": 1, "search_seeds": 1}.items():
        value = getattr(config, setting)
        if value < least:
            flag = setting.replace("_", "-")
            raise UserError(f"--{flag} {value} is too small; use {least} or more")
    search(config, argv[cut + 1 :], config.make(config.runs_dir))


def search(config: Config, flags: list[str], launcher: Launcher) -> Results:
    """Search, and report the best settings beside those without the search.

    Args:
        config: what is searched, and where results go.
        flags: of every run.
        launcher: where runs are carried out.

    Raises:
        UserError: a space that does not fit, or no trial that ends well.
        DynmoeError: a run failed for another reason than its settings.
    """
    seeds = read_seeds(config.seeds)
    used = range(SEARCH_SEED, SEARCH_SEED + config.search_seeds)
    if set(seeds) & set(used):
        raise UserError(f"--seeds {config.seeds} has seeds of the trials; use some below 1000")
    own = Search(config, flags, read_space(config.space), launcher)
    own.plan(first_values(own.space), "")  # settings that do not exist are told before any trial
    digest = hashlib.sha256(own.about.encode()).hexdigest()[:8]
    name = config.name or f"{config.command}-{digest}"
    out = config.runs_dir / "search" / name
    command = f"python -m dynmoe.search --trials {config.trials} --seeds {config.seeds} {own.about}"
    with writing(out):
        best = run_trials(own, open_study(own, out), out, command)
    module = load(config.command)
    before, common = apart(own.space, flags)
    found = {"without the search": before, "best trial": best}
    return run_study(
        Sweep(name, found, None, QUESTION, config.metric, config.at),
        module.experiment(), module.presets(), common, seeds, launcher, config.runs_dir, out,
        command, retries=config.retries,
    )  # fmt: skip


def apart(space: Space, flags: list[str]) -> tuple[str, list[str]]:
    """Flags of settings that are searched, which the best trial must not have; and all others."""
    searched = settings_in([f"--{name}" for name in space])
    before: list[str] = []
    common: list[str] = []
    chosen = common
    for word in flags:
        if word.startswith("--"):
            chosen = before if settings_in([word]) & searched else common
        chosen.append(word)
    return shlex.join(before), common


def open_study(search: Search, out: Path) -> optuna.Study:
    """The trials that the folder holds, or none yet.

    Raises:
        UserError: they are of another search.
    """
    import optuna
    from sqlalchemy import URL

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=URL.create("sqlite", database=str(out / "search.db")).render_as_string(),
        study_name="search",
        direction="minimize" if search.config.minimize else "maximize",
        load_if_exists=True,
    )
    known = study.user_attrs.get("about")
    if known is None:
        study.set_user_attr("about", search.about)
    elif known != search.about:
        raise UserError(f"{out} holds another search ({known}); use that one, or another --name")
    return study


def run_trials(search: Search, study: optuna.Study, out: Path, command: str) -> str:
    """Make the trials that are missing, write them to `out`, and return the best one's flags.

    As many are chosen at once as run at a time. A trial is chosen by a generator of its own number:
    a search that is killed and started again chooses what it would have chosen.

    Raises:
        UserError: no trial has ended well.
        DynmoeError: a run failed for another reason than its settings.
    """
    import optuna

    state, space = optuna.trial.TrialState, distributions(search.space)
    earlier: dict[int, list[Series]] = {}
    while True:
        open_ = study.get_trials(deepcopy=False, states=(state.RUNNING,))  # of a killed search
        ended = len(study.trials) - len(open_)
        batch = open_[: max(0, search.config.trials - ended)]
        while len(batch) < min(search.launcher.jobs, search.config.trials - ended):
            seed = SEARCH_SEED + len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            number = study.ask(space).number
            batch.append(study.trials[number])
        if not batch:
            break
        for trial in study.get_trials(deepcopy=False, states=(state.COMPLETE,)):
            if search.config.prune and trial.number not in earlier:
                earlier[trial.number] = _logged(search, trial.params)
        told = _make(search, {trial.number: trial.params for trial in batch}, earlier)
        for number, end in told.items():
            study.set_user_attr(f"message {number}", end.message)
            study.tell(number, end.value, state[end.state])
        _write(study, out, command)
    _write(study, out, command)
    return _show(search, study)


State = Literal["COMPLETE", "PRUNED", "FAIL"]
"""Optuna's names."""


@dataclass(frozen=True)
class End:
    """How a trial ended."""

    state: State
    value: float | None = None
    """of a complete one"""
    message: str = ""
    """of one that is not"""


def _logged(search: Search, values: dict[str, Any]) -> list[Series]:
    """What the runs of a complete trial have logged of the number that trials are stopped by.

    Raises:
        UserError: there is no such number.
    """
    tag = search.config.prune
    folders = [job.folder for job in search.plan(values, "")]
    found = [logged_series(folder, tag) for folder in folders]
    if not all(found):
        raise UserError(f"{folders[0] / 'log.jsonl'} has no number {tag!r} of --prune")
    return found


def _make(
    search: Search, trials: dict[int, dict[str, Any]], earlier: dict[int, list[Series]]
) -> dict[int, End]:
    """Number -> how each trial ended, against the bar that earlier ones set."""
    told: dict[int, End] = {}
    planned = {}
    for number, values in trials.items():
        try:
            planned[number] = search.plan(values, f"trial {number}: {flags_of(values)}")
        except UserError as error:
            told[number] = End("FAIL", message=str(error))
    runs = [series for own in earlier.values() for series in own]
    wanted = bar(search.config.prune, runs, search.config.minimize)
    jobs = [replace(job, bar=wanted) for own in planned.values() for job in own]
    failed = try_jobs(jobs, search.launcher, "search", search.config.retries, keep_going=True)
    ends: dict[int, State] = {
        Pruned.exit_code: "PRUNED", UserError.exit_code: "FAIL", NumericError.exit_code: "FAIL",
    }  # fmt: skip
    messages = {}
    for job, failure in failed:
        if failure.exit_code not in ends:
            fault = DynmoeError(f"{job.label}: {failure.message}")
            fault.exit_code = failure.exit_code
            raise fault  # no fault of the settings: the trial is made again
        messages[job.folder] = End(ends[failure.exit_code], message=failure.message)
    for number, own in planned.items():
        bad = [messages[job.folder] for job in own if job.folder in messages]
        told[number] = bad[0] if bad else End("COMPLETE", search.value(own))
    return dict(sorted(told.items()))


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def _good(study: optuna.Study) -> list[tuple[float, optuna.trial.FrozenTrial]]:
    """(value, trial) of those that ended well, the best first."""
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    good = [(trial.value, trial) for trial in _ended(study) if trial.value is not None]
    return sorted(good, key=lambda pair: (sign * pair[0], pair[1].number))


def _write(study: optuna.Study, out: Path, command: str) -> None:
    """Write search.json."""
    rows = [
        {"trial": trial.number, "flags": flags_of(trial.params), "value": trial.value,
         "state": trial.state.name.lower(),
         "message": study.user_attrs.get(f"message {trial.number}", "")}
        for trial in _ended(study)
    ]  # fmt: skip
    good = _good(study)
    best = flags_of(good[0][1].params) if good else None
    write_json(out / "search.json", {"command": command, "best": best, "trials": rows})


def _show(search: Search, study: optuna.Study) -> str:
    """Show the best trials, and return the flags of the best.

    Raises:
        UserError: no trial has ended well.
    """
    ended, good = _ended(study), _good(study)
    if not good:
        message = study.user_attrs.get(f"message {ended[-1].number}", "")
        raise UserError(f"no trial ended well; the last one: {message}")
    table = [["trial", "flags", "value"]]
    table += [[str(t.number), flags_of(t.params), f"{value:.4g}"] for value, t in good[:SHOWN]]
    states = [trial.state.name.lower() for trial in ended]
    caption = (
        f"{len(ended)} trials, {states.count('fail')} failed, {states.count('pruned')} stopped "
        f"early; seeds from {SEARCH_SEED} on"
    )
    print_table("search", table, caption)
    return flags_of(good[0][1].params)


if __name__ == "__main__":
    run_command(main)

"""All runs of a comparison, each a process, and what they add up to."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.experiments.dg.settings import Config
from dynmoe.experiments.dg.source import load_source
from dynmoe.lab.config import from_dict, identity, to_dict
from dynmoe.lab.jobs import Job, run_jobs
from dynmoe.lab.results import Result, read_run
from dynmoe.lab.run import Run

LEAST = {"seeds": 1, "jobs": 1, "steps": 1, "eval_every": 1, "batch_size": 1, "eval_batch": 1,
         "threads": 0, "lr": 0, "weight_decay": 0, "granularity": 0, "features": 0,
         "landscape": 0}  # fmt: skip
"""Setting -> the smallest value that can work. Parts check their own options."""


def run_all(preset: str, config: Config) -> Result:
    """Train `config.method` and each of `config.compare` in all trials; print, write and draw.

    Raises:
        UserError: settings that cannot work, told before any work.
    """
    check(config)
    methods = [config, *(_compared(config, name) for name in _others(config))]
    if config.threads:
        torch.set_num_threads(config.threads)
    load_source(config)  # fails early, and fills the caches that the runs then read
    trials = {
        one.method.part.name: [_trial(preset, one, config.seed + i) for i in range(config.seeds)]
        for one in methods
    }
    jobs = {name: [job_of(preset, one) for one in own] for name, own in trials.items()}
    flat = [job for own in jobs.values() for job in own]
    alone = config.jobs == 1 or len(flat) == 1
    for name, own in trials.items():
        for one, job in zip(own, jobs[name], strict=True):
            if alone or job.done:  # a finished run is opened too, to see that its settings are ours
                run_method(preset, one)
    run_jobs(flat, config.jobs, "dg")
    from dynmoe.experiments.dg.report import report

    summaries = {name: [job.summary() for job in own] for name, own in jobs.items()}
    folders = {name: [job.folder for job in own] for name, own in jobs.items()}
    first = folders[config.method.part.name][0]
    report(first.parent / "report", config, summaries, folders)
    return Result(first.parent / "report", tuple(read_run(job.folder) for job in flat))


def main(argv: list[str]) -> None:
    """One run in a process of its own: argv is the preset and the settings as JSON."""
    preset, settings = argv
    run_method(preset, from_dict(Config, json.loads(settings)))


def run_method(preset: str, config: Config) -> None:
    """Train one method in one trial, on all left-out domains, or see that it is done."""
    with _run(preset, config) as run:
        if run.summary is None:
            from dynmoe.experiments.dg.trial import Trial

            run.finish(Trial(run, config, load_source(config)).run_all())


def check(config: Config) -> None:
    """Refuse numbers that cannot work before any work is done.

    Raises:
        UserError: names the flag.
    """
    for name, least in LEAST.items():
        value = getattr(config, name)
        if not value >= least:  # also refuses nan
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value} is too small; use {least} or more")


def _run(preset: str, config: Config) -> Run:
    return Run("dg", preset, config, label=f"{config.method.part.name}-{config.domains.part.name}")


def job_of(preset: str, config: Config) -> Job:
    """The run of these settings: one method in one trial."""
    settings = json.dumps(to_dict(config))
    label = f"{config.method.part.name}, seed {config.seed}"
    return Job(
        label,
        "experiments.dg.experiment",
        (preset, settings),
        _run(preset, config).folder,
        identity(config),
    )


def _trial(preset: str, config: Config, seed: int) -> Config:
    return replace(config, seed=seed, resume=True)  # as studies do: going on is never wrong


def _others(config: Config) -> list[str]:
    """Methods to compare with; the main one is left out."""
    own = config.method.part.name
    twice = [n for n in config.compare if config.compare.count(n) > 1]
    if twice:
        raise UserError(f"--compare names {twice[0]} twice; name each once")
    return [name for name in config.compare if name != own]


def _compared(config: Config, name: str) -> Config:
    """The same settings with another method, at its defaults and without growth."""
    own_name = f"{config.name}-{name}" if config.name else None
    method = registry.get("dg", name).Config()
    return replace(config, method=method, granularity=0, name=own_name)

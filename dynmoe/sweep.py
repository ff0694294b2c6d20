"""`python -m dynmoe.sweep`: a command over variants and seeds, compared with intervals.

    python -m dynmoe.sweep cl --name class --seeds 5
        --variants "dense: --method dense" "g2: --granularity 2" -- --protocol class

What follows `--` are flags of every run. Each run is a run of the command itself, in a folder of
its own; finished ones are read, unfinished ones resumed, so a sweep can be stopped and started
again at will.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from dynmoe.config import run_command
from dynmoe.errors import DynmoeError, Interrupted, UserError
from dynmoe.sweep_report import report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a sweep."""

    command: Annotated[Literal["cl", "rl"], tyro.conf.Positional] = "cl"
    """the command to run"""
    variants: tuple[str, ...] = ("dense: --method dense", "g2: --granularity 2")
    """what is compared, each as "label: flags" """
    flags: tyro.conf.Suppress[tuple[str, ...]] = ()
    name: str = "sweep"
    """names the sweep's folder and its runs"""
    seeds: int = 5
    """seeds 0 .. N-1 of each variant"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each a process"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    debug: bool = False
    """show the traceback of an error"""


def main(argv: list[str]) -> None:
    """Run what is not finished yet, then write results.json and the figure, and print the table."""
    cut = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(Config, args=argv[:cut], prog="python -m dynmoe.sweep", description=__doc__)
    config = replace(config, flags=tuple(argv[cut + 1 :]))
    variants = dict(_parse(text) for text in config.variants)
    jobs = {
        (label, seed): _argv(config, label, flags, seed)
        for seed in range(config.seeds)
        for label, flags in variants.items()
    }
    handler = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        _run_all(config, jobs)
    finally:
        signal.signal(signal.SIGTERM, handler)
    runs = {
        label: [_summary(config, label, seed) for seed in range(config.seeds)] for label in variants
    }
    settings = {"flags": shlex.join(config.flags), "seeds": config.seeds}
    flags = {label: shlex.join(chosen) for label, chosen in variants.items()}
    report(config.command, config.runs_dir / "sweep" / config.name, settings, flags, runs)


def _parse(text: str) -> tuple[str, list[str]]:
    label, colon, flags = text.partition(":")
    if not colon or not label.strip():
        raise UserError(f'variant {text!r} must read "label: flags", such as "g2: --granularity 2"')
    return label.strip(), shlex.split(flags)


def _argv(config: Config, label: str, flags: list[str], seed: int) -> list[str]:
    place = ["--name", f"{config.name}/{label}", "--runs-dir", str(config.runs_dir)]
    alone = [] if "--compare" in (*config.flags, *flags) else ["--compare"]
    return [*config.flags, *flags, *alone, *place, "--seed", str(seed), "--resume"]


def _folder(config: Config, label: str, seed: int) -> Path:
    return config.runs_dir / config.command / config.name / label / f"seed-{seed}"


def _summary(config: Config, label: str, seed: int) -> Any:
    return json.loads((_folder(config, label, seed) / "summary.json").read_text())


def _run_all(config: Config, jobs: dict[tuple[str, int], list[str]]) -> None:
    """Run all jobs in worker processes; the first failure stops those not begun.

    Raises:
        DynmoeError: a run failed; its message and exit code are passed on.
    """
    todo = {
        key: argv
        for key, argv in jobs.items()
        if not (_folder(config, *key) / "summary.json").is_file()
    }
    if not todo:
        return
    from rich.console import Console
    from rich.progress import Progress

    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stop = context.Event()
    with (
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(config.jobs, context, _set_stop, (stop,)) as pool,
    ):
        bar = progress.add_task(config.name, total=len(jobs), completed=len(jobs) - len(todo))
        futures = {
            pool.submit(_run_one, config.command, argv, _folder(config, *key)): key
            for key, argv in todo.items()
        }
        try:
            for future in as_completed(futures):
                label, seed = futures[future]
                error = future.result()
                if error is not None:
                    failure = DynmoeError(f"{label}, seed {seed}: {error[0]}")
                    failure.exit_code = error[1]
                    raise failure
                progress.update(bar, advance=1)
                if not progress.console.is_terminal:
                    print(f"{config.name}: {label}, seed {seed} done", file=sys.stderr, flush=True)
        except (
            BaseException
        ) as reason:  # also Ctrl-C, which the runs under way get as well, and save
            stop.set()
            if isinstance(reason, Interrupted):  # SIGTERM came to this process alone
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Interrupted(
        "stopped by SIGTERM; runs under way have saved: start it again to go on", number
    )


_stop: Any = None
"""In a worker: an event, set when no further run is to begin."""


def _set_stop(stop: Any) -> None:
    global _stop
    _stop = stop


def _run_one(command: str, argv: list[str], folder: Path) -> tuple[str, int] | None:
    """In a worker: run the command, its output into the run's folder.

    Returns:
        an error's text and exit code, or None.
    """
    if _stop.is_set():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            importlib.import_module(f"dynmoe.{command}").main(argv)
        except DynmoeError as error:
            return str(error), error.exit_code
        except SystemExit as exit_:  # tyro, on a bad flag
            code = int(exit_.code or 0)
            return (f"exit {code}, see {folder / 'output.txt'}", code) if code else None
    return None


if __name__ == "__main__":
    run_command(main)

"""Runs of sweeps and studies are known by their settings, not by their folders alone."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dynmoe import commands, registry, sweep
from dynmoe.errors import DynmoeError, Interrupted, UserError
from dynmoe.lab import runner
from dynmoe.lab.config import identity, to_dict
from dynmoe.lab.launchers import Failure, Launcher, Local, Outcome, Work
from dynmoe.lab.runner import Job, make_job, results_of, run_jobs, try_jobs

COMMANDS = ("cl", "rl", "tta", "dg")


def _job(command: str, runs: Path, **changes: Any) -> tuple[Job, Any]:
    """A job of a command's first preset, and its settings."""
    module = commands.load(command)
    preset, config = next(iter(module.presets().items()))
    config = replace(config, runs_dir=runs, name="x", compare=(), **changes)
    return make_job(module.experiment(), preset, config, "x", None), config


def _finish(job: Job, config: Any) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps(to_dict(config)))
    (job.folder / "summary.json").write_text("{}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_run_counts_for_its_own_settings_alone(command: str, tmp_path: Path) -> None:
    job, config = _job(command, tmp_path)
    assert not job.done and pickle.loads(pickle.dumps(job)) == job
    assert identity(job.config) == identity(config)
    _finish(job, config)
    assert job.done
    run_jobs([job, job], Local(1), "nothing to do")
    other, _ = _job(command, tmp_path, batch_size=config.batch_size + 1) if command != "rl" else (
        _job(command, tmp_path, num_envs=config.num_envs * 2)
    )  # fmt: skip
    assert other.folder == job.folder
    with pytest.raises(UserError, match=r"holds a run with other settings \(.* -> ") as caught:
        run_jobs([other], Local(1), "refused")
    assert "\n" not in str(caught.value)


def test_two_jobs_of_one_folder_need_the_same_settings(tmp_path: Path) -> None:
    job, _ = _job("cl", tmp_path)
    other, _ = _job("cl", tmp_path, epochs=3)
    with pytest.raises(UserError, match=r"have one folder, .*, and other settings \(epochs: "):
        run_jobs([job, other], Local(1), "refused")


def test_settings_that_cannot_be_read_are_no_ones(tmp_path: Path) -> None:
    job, config = _job("cl", tmp_path)
    _finish(job, config)
    (job.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read; delete"):
        run_jobs([job], Local(1), "refused")


def test_data_sets_that_auto_found_are_not_averaged(tmp_path: Path) -> None:
    """Those that are named may differ, and so may those of two streams."""

    def run(data: str, found: str, seed: int) -> Job:
        part = registry.get("dataset", data).Config()
        job, config = _job("cl", tmp_path / data, dataset=part, seed=seed)
        _finish(job, config)
        (job.folder / "summary.json").write_text(json.dumps({"dataset": found}))
        return job

    one, other = run("auto", "fractal-hard-32", 0), run("auto", "tiny-imagenet", 1)
    named = run("digits", "digits", 0)
    results_of({"a": {"x": [one], "y": [named]}, "b": {"x": [other]}}, one.experiment)
    told = "seed-0 was run on fractal-hard-32 and .*seed-1 on tiny-imagenet, .*: --dataset NAME"
    for variants in ({"x": [one, other]}, {"x": [one], "y": [other]}):
        with pytest.raises(UserError, match=told):
            results_of({"a": variants}, one.experiment)


def test_what_the_disk_refuses_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command itself tells it; faults of ours name the file with their traceback."""
    job, _ = _job("cl", tmp_path)
    for error, told, code in (
        (OSError(errno.ENOSPC, "No space left", "w.pt"), "disk full: w.pt could not be", 4),
        (OSError(errno.EROFS, "Read-only", "w.pt"), "w.pt: Read-only; mend that", 2),
        (ZeroDivisionError("division"), f"division (see {job.folder / 'output.txt'})", 1),
    ):
        monkeypatch.setattr(runner, "run_one", Mock(side_effect=error))
        failure = runner.carry_out(job)
        assert failure is not None and told in failure.message and failure.exit_code == code
    assert (job.folder / "output.txt").read_text().count("Traceback") == 3


@dataclass(frozen=True)
class Counting(Launcher):
    """Runs nothing; each piece of work fails as often as asked for, and then ends well."""

    failures: int
    given: list[int] = field(default_factory=list)
    jobs = 1

    def launch(self, work: Work, items: list[Any]) -> Iterator[Outcome]:  # type: ignore[override]
        self.given.append(len(items))
        failed = Failure("killed", 4) if len(self.given) <= self.failures else None
        yield from ((item, failed) for item in items)


@dataclass(frozen=True)
class Stopped(Launcher):
    """Ctrl-C comes while it waits."""

    jobs = 1

    def launch(self, work: Work, items: list[Any]) -> Iterator[Outcome]:  # type: ignore[override]
        raise KeyboardInterrupt
        yield


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    job, _ = _job("dg", tmp_path)
    told = "stopped by SIGINT; runs under way have saved: start it again to go on"
    with pytest.raises(Interrupted, match=told) as caught:
        run_jobs([job], Stopped(), "waits")
    assert caught.value.exit_code == 130


def test_the_failure_that_ends_a_command_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = _job("cl", tmp_path)
    with pytest.raises(DynmoeError, match=f"{job.label}: killed"):
        run_jobs([job], Counting(9), "counted")
    assert "killed" not in capsys.readouterr().err
    run_jobs([job], Counting(0), "counted")
    assert f"counted: {job.label} done" in capsys.readouterr().err


@pytest.mark.parametrize(("failures", "launches"), [(0, [1]), (1, [1, 1]), (9, [1, 1, 1])])
def test_a_launcher_is_started_as_long_as_a_run_is_left(
    failures: int, launches: list[int], tmp_path: Path
) -> None:
    job, _ = _job("cl", tmp_path)
    launcher = Counting(failures)
    failed = try_jobs([job], launcher, "counted", retries=2, keep_going=True)
    assert launcher.given == launches and bool(failed) == (failures == 9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds 0 is too small"),
        (["--jobs", "0"], "--jobs 0 is too small"),
        (["--variants", "a: --lr 1", "a: --lr 2"], "variant 'a' is named twice"),
        (["--variants"], "--variants needs one or more"),
    ],
)
def test_a_sweep_that_cannot_work(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(["cl", "--runs-dir", str(tmp_path), *flags])

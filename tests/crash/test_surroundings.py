"""What goes wrong around a run: its disk, its packages, other processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import assert_same, error_line, exit_code, last_checkpoint

from dynmoe import rl
from dynmoe.dg import __main__ as dg
from dynmoe.dg.methods.baselines import ERM
from dynmoe.errors import UserError
from dynmoe.lab import checkpoint
from dynmoe.lab.config import RunConfig
from dynmoe.lab.run import Run

SMALL = (
    "--preset smoke --encoder.hidden 16 --encoder.widths 16 --num-envs 4 --rollout-steps 16 "
    "--total-steps 256 --minibatches 2 --epochs 1 --probe-every 3 --probe-samples 32 "
    "--checkpoint-every-s 0 --trigger every --trigger.steps 100 --name x"
)
"""4 updates, and a checkpoint after each."""


def _run(folder: Path, **changes: Any) -> Run:
    return Run("test", "p", replace(RunConfig(runs_dir=folder, device="cpu"), **changes))


def command(runs: Path, *flags: str) -> int:
    return exit_code(rl.main, [*SMALL.split(), "--runs-dir", str(runs), *flags])


def folder(runs: Path) -> Path:
    return runs / "rl" / "x" / "seed-0"


def _race(runs: Path, start: Any, won: Any) -> None:
    start.wait()
    try:
        with _run(runs) as mine:
            mine.log.scalars(1, {"x": 1.0})
            won.put(os.getpid())
            time.sleep(0.5)  # while the others try
            mine.finish({})
    except UserError as error:
        won.put(str(error))


def test_of_processes_that_race_for_a_folder_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(6), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, start, won)) for _ in range(6)]
    for racer in racers:
        racer.start()
    said = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    (winner,) = (one for one in said if isinstance(one, int))
    assert winner in {racer.pid for racer in racers}
    losers = [one for one in said if isinstance(one, str)]
    assert len(losers) == 5 and all("is in use by process" in one for one in losers)
    (log,) = tmp_path.rglob("log.jsonl")
    assert log.read_text() == '{"step": 1, "x": 1.0}\n'


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_are_not_saved_by_dg(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else the run could never go on."""
    original = ERM.loss

    def spoilt(self: ERM, *args: Any) -> Any:
        loss, figures = original(self, *args)
        nothing = 0 * next(iter(self.trainable())).sum()
        return loss + (nothing / 0 if what == "loss" else nothing.sqrt()), figures

    monkeypatch.setattr(ERM, "loss", spoilt)
    argv = "--preset smoke --compare --method erm --test-domains edges --steps 3 --name x"
    more = f"--checkpoint-every-s 0 --runs-dir {tmp_path}"
    assert exit_code(dg.main, f"{argv} {more}".split()) == 3
    expected = {"loss": "the loss of erm is nan", "gradient": "is no longer finite at step 1"}
    assert expected[what] in error_line(capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.pt"))


def _mounted(place: Path, options: str) -> bool:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        return subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kilobytes, where this process may mount one."""
    place = tmp_path / "disk"
    if sys.platform != "linux" or not _mounted(place, "size=64k"):
        pytest.skip("no right to mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_a_disk_that_may_only_be_read(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first file and in the middle of a run: one line that names the file."""
    (disk / "used").mkdir()
    with _run(disk / "used") as begun:
        begun.checkpoint(1, {})
    _remount(disk, "ro")
    assert command(disk / "new") == 2
    assert "Read-only file system; use another --runs-dir" in error_line(capsys.readouterr().err)
    assert exit_code(lambda argv: _run(disk / "used", resume=True).__enter__(), []) == 2
    line = error_line(capsys.readouterr().err)
    assert str(disk) in line and "Read-only file system; mend that" in line


@pytest.mark.slow
def test_a_real_disk_that_is_full(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4 in one line; with more room the run goes on, and ends as it would have."""
    assert command(tmp_path / "whole") == 0
    size, codes = 64, []
    while (code := command(disk, "--resume")) != 0:
        codes.append(code)
        assert "disk full" in error_line(capsys.readouterr().err)
        saved = folder(disk) / "checkpoints"
        assert not checkpoint.exists(saved) or checkpoint.load_latest(saved) is not None
        size += 32
        assert size < 4096
        _remount(disk, f"size={size}k")
    assert len(codes) > 3 and set(codes) == {4}
    one, two = folder(tmp_path / "whole"), folder(disk)
    for name in ("log.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert_same(last_checkpoint(one), last_checkpoint(two))


@pytest.mark.slow
def test_a_run_under_a_clock_that_runs_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour back at every look, and files of a checkpoint from the future."""
    assert command(tmp_path / "whole") == 0
    times = iter(range(1_800_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    updates = iter(range(100))
    original = checkpoint.save

    def save(place: Path, step: int, state: dict[str, Any]) -> Path:
        path = original(place, step, state)
        os.utime(path, (4e9 - step, 4e9 - step))  # the newest is the oldest by its time
        if next(updates) == 1:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", save)
    assert command(tmp_path / "back") == 130
    assert command(tmp_path / "back", "--resume") == 0
    for name in ("log.jsonl", "summary.json"):
        one, two = (folder(tmp_path / n) / name for n in ("whole", "back"))
        assert one.read_bytes() == two.read_bytes(), name

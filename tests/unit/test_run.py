"""The run context: lock, settings, resume, signals, and what it leaves in the folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynmoe.errors import Interrupted, UserError
from dynmoe.lab import run as run_module
from dynmoe.lab.config import RunConfig
from dynmoe.lab.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A command's settings."""

    lr: float = 0.1


def _run(tmp_path: Path, **changes: Any) -> Run:
    config = Config(runs_dir=tmp_path, device="cpu")
    return Run("test", "preset", replace(config, **changes), label="label")


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    with _run(tmp_path) as run:
        assert run.summary is None and run.restored is None
        assert run.folder == tmp_path / "test" / run.name / "seed-0"
        assert run.name.startswith("preset-label-") and len(run.name) == len("preset-label-") + 8
        assert not run.checkpoint_due()
        run.checkpoint(3, {"x": torch.ones(2)})
        run.log.scalars(3, {"loss": 1.0})
        run.finish({"accuracy": 0.5})
    assert json.loads((run.folder / "summary.json").read_text()) == {"accuracy": 0.5}
    assert json.loads((run.folder / "config.json").read_text())["lr"] == 0.1
    assert (run.folder / "log.jsonl").read_text() == '{"step": 3, "loss": 1.0}\n'

    for resume in (False, True):  # finished: the summary, and nothing is touched
        before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.name != ".lock"}
        with _run(tmp_path, resume=resume) as again:
            assert again.summary == {"accuracy": 0.5}
        assert before == {p: p.stat().st_mtime_ns for p in before}


def test_names(tmp_path: Path) -> None:
    """Seeds share a name, settings do not; where and how a run is kept does not count."""
    name = _run(tmp_path).name
    assert _run(tmp_path, seed=5).name == name
    assert _run(tmp_path, seed=5).folder.name == "seed-5"
    assert _run(tmp_path, resume=True, debug=True, checkpoint_every_s=1.0).name == name
    assert _run(tmp_path, lr=0.2).name != name
    assert _run(tmp_path, name="mine").folder == tmp_path / "test" / "mine" / "seed-0"


def test_going_on_restores_state_log_and_generators(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    with _run(tmp_path, seed=3) as run:
        draws()
        run.log.scalars(1, {"loss": 1.0})
        run.checkpoint(1, {"x": torch.arange(3)})
        expected = draws()
        run.log.scalars(2, {"loss": 2.0})
    with pytest.raises(UserError, match="holds an unfinished run; go on with --resume"):
        _run(tmp_path, seed=3).__enter__()
    with _run(tmp_path, seed=3, resume=True) as run:
        assert run.restored is not None and torch.equal(run.restored["x"], torch.arange(3))
        assert draws() == expected
        assert (run.folder / "log.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
        run.finish({})
    sessions = json.loads((run.folder / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["packages"]["torch"] == metadata.version("torch")
    assert {"command", "started", "commit", "python", "device", "threads"} <= sessions[1].keys()


def test_resume_says_where_there_is_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only to a user who asked: runs of sweeps begin or go on by themselves."""
    with _run(tmp_path, name="sweep", resume=True):
        assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.argv", ["dynmoe cl", "--resume"])
    with _run(tmp_path, resume=True) as run:
        told = f"nothing to resume in {run.folder}: the run begins\n"
        assert capsys.readouterr().err == told
        run.checkpoint(1, {})
    with _run(tmp_path, resume=True):
        assert capsys.readouterr().err == ""


def test_other_versions_than_before_are_told_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line where a run goes on; none where it begins, or under the same versions."""
    with _run(tmp_path) as begun:
        begun.checkpoint(1, {})
    with _run(tmp_path, resume=True) as same:
        same.checkpoint(2, {})
    assert capsys.readouterr().err == ""
    known, before = run_module._version, run_module._version("torch")
    monkeypatch.setattr(run_module, "_version", lambda p: "9.9" if p == "torch" else known(p))
    with _run(tmp_path, resume=True) as other:
        assert other.restored is not None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {begun.folder} goes on under other versions")
    assert f"(torch: {before} -> 9.9)" in line
    sessions = json.loads((begun.folder / "environment.json").read_text())["sessions"]
    assert [s["packages"]["torch"] for s in sessions] == [before, before, "9.9"]
    with _run(tmp_path, seed=1):
        pass
    assert capsys.readouterr().err == ""


def test_a_setting_that_came_later_has_its_default(tmp_path: Path) -> None:
    with _run(tmp_path, name="x") as run:
        run.checkpoint(1, {})
    path = run.folder / "config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("lr") == 0.1
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"other settings \(lr: 0\.1 -> 0\.2\)"):
        _run(tmp_path, name="x", lr=0.2, resume=True).__enter__()
    with _run(tmp_path, name="x", resume=True) as same:
        assert same.restored is not None


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    with _run(tmp_path, name="x") as run:
        run.checkpoint(1, {})
    for changes in ({"lr": 0.2}, {"lr": 0.2, "resume": True}):
        with pytest.raises(UserError, match=r"other settings \(lr: 0\.1 -> 0\.2\); use those"):
            _run(tmp_path, name="x", **changes).__enter__()
    with _run(tmp_path, name="x", resume=True, checkpoint_every_s=7.0) as run:
        run.finish({})
    with pytest.raises(UserError, match="lr"):
        _run(tmp_path, name="x", lr=0.2).__enter__()


def _hold(folder: Path, entered: Any) -> None:
    """In a process of its own: keep a run open."""
    with _run(folder):
        entered.set()
        time.sleep(600)


def test_lock_of_another_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    entered = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, entered))
    holder.start()
    try:
        assert entered.wait(60)
        with pytest.raises(UserError, match=f"is in use by process {holder.pid}; wait for it"):
            _run(tmp_path).__enter__()
        with _run(tmp_path, seed=1):  # another folder
            pass
    finally:
        holder.kill()
        holder.join()
    with _run(tmp_path) as run:
        assert (run.folder / ".lock").read_text() == str(os.getpid())


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def _stopped(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """A run that gets signals while it works."""
    with _run(tmp_path, resume=True) as run:
        assert not run.checkpoint_due()
        signal.raise_signal(number)
        assert run.checkpoint_due()
        if when == "working":
            run.checkpoint(5, {"x": 1})
        elif when == "twice":
            signal.raise_signal(number)
        else:
            run.finish({"done": True})
            return
        pytest.fail("went on after the signal")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: signal.Signals, code: int, tmp_path: Path) -> None:
    before = _handlers()
    with pytest.raises(Interrupted, match=number.name) as caught:
        _stopped(tmp_path, number, "working")
    assert caught.value.exit_code == code and _handlers() == before
    assert "at step 5; go on with: " in str(caught.value) and "--resume" in str(caught.value)
    with _run(tmp_path, resume=True) as run:
        assert run.restored == {"x": 1}

    with pytest.raises(Interrupted, match="at once") as caught:
        _stopped(tmp_path, number, "twice")
    assert caught.value.exit_code == code and _handlers() == before

    with pytest.raises(Interrupted, match=number.name) as caught:
        _stopped(tmp_path, number, "finishing")
    assert caught.value.exit_code == code and _handlers() == before
    with _run(tmp_path) as run:
        assert run.summary == {"done": True}


def test_time_of_checkpoints(tmp_path: Path) -> None:
    with _run(tmp_path, checkpoint_every_s=0.05) as run:
        time.sleep(0.06)
        assert run.checkpoint_due()
        run.checkpoint(1, {})
        assert not run.checkpoint_due()


def test_handlers_and_lock_are_given_back_after_an_error(tmp_path: Path) -> None:
    before = _handlers()
    with pytest.raises(ZeroDivisionError), _run(tmp_path):
        _ = 1 / 0
    assert _handlers() == before
    with _run(tmp_path) as run:
        run.finish({})

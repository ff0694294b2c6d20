"""Checkpoints: whole or not there at all, two of them kept, damaged ones named and passed over."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab import checkpoint
from dynmoe.lab.checkpoint import exists, load_latest, save


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.glob("step-*.pt"))


def _save(folder: Path, *steps: int) -> None:
    for step in steps:
        save(folder, step, {"step": step, "tensor": torch.full((100,), float(step))})


def test_saves_loads_and_keeps_two(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    assert load_latest(folder) is None and not exists(folder)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "plain": [1, 2.5, None, "x", {"deep": (True, b"bytes")}],
    }
    path = save(folder, 7, state)
    assert path.name == "step-000000007.pt" and exists(folder)
    for loaded in (load_latest(folder), torch.load(path, weights_only=True)):
        assert loaded is not None and loaded["plain"] == state["plain"]
        assert torch.equal(loaded["model"]["weight"], model.weight)
        assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"],
                           optimizer.state[model.weight]["exp_avg"])  # fmt: skip
    _save(folder, 8, 9, 10, 10_000_000_000)
    assert _steps(folder) == [10, 10_000_000_000]
    assert len(os.listdir(folder)) == 4  # each with its checksum


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"growth": {"trigger": {"recent": deque([1])}}}, r"growth\.trigger\.recent is a deque"),
        ({"parts": [torch.zeros(1), np.float64(2)]}, r"parts\.1 is a float64"),
        ({"kind": UserError}, r"kind is a type"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, state: dict[str, Any], told: str
) -> None:
    """A trigger of one's own that keeps a deque would else cost the run at its resume."""
    _save(tmp_path, 1)
    with pytest.raises(UserError, match=told):
        save(tmp_path, 2, state)
    assert _steps(tmp_path) == [1]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lose_checksum(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


def _spoil_checksum(path: Path) -> None:
    path.with_name(path.name + ".sha256").write_bytes(b"\xff\x00")


DAMAGES = [_truncate, _flip_a_byte, _empty, _lose_checksum, _spoil_checksum]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_one_is_named_and_passed_over(
    damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path, 1, 2)
    damage(tmp_path / "step-000000002.pt")
    assert load_latest(tmp_path)["step"] == 1  # type: ignore[index]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{tmp_path / 'step-000000002.pt'} is damaged" in message

    damage(tmp_path / "step-000000001.pt")
    with pytest.raises(ResourceError, match=f"no checkpoint in {tmp_path} can be read"):
        load_latest(tmp_path)
    assert exists(tmp_path)  # so that no run starts over without being told to


def test_damaged_one_does_not_take_a_whole_ones_place(tmp_path: Path) -> None:
    """Going on from step 10 after step 20 was damaged, with saves at other steps than before."""
    _save(tmp_path, 10, 20)
    _truncate(tmp_path / "step-000000020.pt")
    _save(tmp_path, 12)
    assert _steps(tmp_path) == [10, 12]
    _save(tmp_path, 14)
    assert _steps(tmp_path) == [12, 14]


class _Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("old_steps", [(), (4,), (5,), (4, 5), (3, 4)])
def test_killed_at_any_moment_of_a_save(
    old_steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when step 5 is saved again: the old one or the new one, never neither."""
    replace = os.replace
    for number in range(1, 5):
        folder = tmp_path / str(number)
        _save(folder, *old_steps)
        calls = 0

        def killing(source: Path, target: Path, stop_at: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise _Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", killing)
        try:
            save(folder, 5, {"step": 5, "again": True})
        except _Killed:
            assert number <= calls
        else:
            assert number > 2  # a checkpoint is at least two files
        monkeypatch.setattr(os, "replace", replace)
        loaded = load_latest(folder)
        if old_steps:
            assert loaded is not None and loaded["step"] in (old_steps[-1], 5)
        elif loaded is not None:
            assert loaded["again"]
        assert not list(folder.glob(".*"))
        save(folder, 5, {"step": 5, "third": True})
        assert load_latest(folder) == {"step": 5, "third": True}


@pytest.mark.parametrize(("failures", "left"), [(1, [4, 5]), (2, [4])])
def test_full_disk_costs_the_oldest_once(
    failures: int, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 3, 4)
    write, tries = checkpoint.write_atomic, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal tries
        if path.suffix == ".pt":
            tries += 1
            if tries <= failures:
                raise ResourceError("disk full")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    if failures == 1:
        _save(tmp_path, 5)
    else:
        with pytest.raises(ResourceError, match="disk full"):
            _save(tmp_path, 5)
    assert tries == 2
    assert _steps(tmp_path) == left
    assert load_latest(tmp_path)["step"] == left[-1]  # type: ignore[index]


def test_full_disk_never_costs_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 3)

    def full(path: Path, data: bytes) -> None:
        raise ResourceError("disk full")

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(ResourceError):
        _save(tmp_path, 4)
    assert load_latest(tmp_path)["step"] == 3  # type: ignore[index]


class Code:
    """Unpickled without care it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = checkpoint.save(tmp_path / "c", 1, {"state": 0})
    torch.save({"state": Code(made)}, path)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    for load in (lambda: checkpoint.load_latest(path.parent), lambda: checkpoint.load(path)):
        with pytest.raises(ResourceError, match="it could run code"):
            load()
    assert not made.exists()

"""Atomic writing: whatever goes wrong, the old file or the new one is there, and nothing else."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab import files
from dynmoe.lab.files import make_folder, remove_leftovers, write_atomic, write_json


def _failing(error: OSError) -> Any:
    """An `open` whose files take half of what is written and then fail."""

    class Failing(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            raise error

    return Failing


def test_write_replace_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data in (b"one", b"", bytes(range(256)) * 1000):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failure_keeps_the_old_file(
    where: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, error = tmp_path / "a.bin", OSError(code, os.strerror(code))
    write_atomic(path, b"old")

    def fail(*_: Any) -> None:
        raise error

    if where == "write":
        monkeypatch.setattr(files, "open", _failing(error), raising=False)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError if code == errno.EIO else ResourceError) as caught:
        write_atomic(path, b"new" * 1_000_000)
    if code != errno.EIO:
        free_mb = files.shutil.disk_usage(tmp_path).free / 1e6
        message = str(caught.value)
        assert "disk full: writing a.bin needs 3.0 MB, " in message and str(tmp_path) in message
        assert float(message.split("3.0 MB, ")[1].split(" MB are free")[0]) == pytest.approx(
            free_mb, rel=0.2
        )
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "é"})
    assert json.loads(path.read_text()) == {"b": [1, 2.5, None], "a": "é"}
    assert path.read_text().endswith("\n")
    write_json(path, {"x": [float("nan"), (float("-inf"), 0.5)], "n": 3, "t": True})
    assert json.loads(path.read_text()) == {"x": [None, [None, 0.5]], "n": 3, "t": True}


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    for name in (".a.pt.123.tmp", "a.pt", ".lock", "b.tmp"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "a.pt", "b.tmp"]


def test_a_report_s_folder_is_made_and_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    (folder / ".results.json.7.tmp").write_text("{")
    (folder / "results.json").write_text("{}")
    make_folder(folder)
    assert os.listdir(folder) == ["results.json"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_where_a_folder_should_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot make {tmp_path / name}: .*; use another folder"):
        make_folder(tmp_path / name)

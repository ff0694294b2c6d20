"""The cache saves work and never stops a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dynmoe.lab import cache

ARRAYS: cache.Arrays = {"a": np.arange(500), "b": np.eye(3, dtype=np.uint8)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def _equal(got: cache.Arrays) -> bool:
    return got.keys() == ARRAYS.keys() and all(np.array_equal(got[k], ARRAYS[k]) for k in ARRAYS)


def _never() -> cache.Arrays:
    raise AssertionError("made again although cached")


def test_second_call_reads_what_the_first_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert _equal(cache.load_or_make("x", lambda: ARRAYS))
    assert _equal(cache.load_or_make("x", _never))
    assert [p.name for p in cache.folder().iterdir()] == ["x.npz"]
    assert capsys.readouterr().err == ""


def test_states_of_files_show_every_change(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    seen = [cache.file_states([path, other])]
    assert cache.file_states([path, other]) == seen[0] != cache.file_states([other, path])
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    seen.append(cache.file_states([path, other]))
    path.rename(tmp_path / "c")
    other.rename(path)  # its times of content are those of before
    seen.append(cache.file_states([path, tmp_path / "c"]))
    seen.append(cache.file_states([path, other]))  # one is missing
    digests = {cache.digest({"files": states}) for states in seen}
    assert len(digests) == 4


def test_folder_is_under_home_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder() == Path(os.environ["HOME"]) / ".cache" / "dynmoe"


def _flip_middle(b: bytes) -> bytes:
    return b[:1000] + bytes([b[1000] ^ 255]) + b[1001:]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], _flip_middle, lambda b: b"", lambda b: b"not an archive" * 9],
    ids=["truncated", "flipped", "empty", "text"],
)
def test_damaged_file_is_made_again_with_one_line(
    damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    cache.load_or_make("x", lambda: ARRAYS)
    path = cache.folder() / "x.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert _equal(cache.load_or_make("x", lambda: ARRAYS))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and "again" in err
    assert _equal(cache.load_or_make("x", _never))


def test_unwritable_folder_is_passed_over_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _equal(cache.load_or_make("x", lambda: ARRAYS))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be written" in err


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    cache.write_npz(path, ARRAYS)

    def full(*_: object) -> None:
        raise OSError("disk full")

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        cache.write_npz(path, {"a": np.zeros(9)})
    with np.load(path) as file:
        assert _equal(dict(file))
    assert set(tmp_path.iterdir()) == before


def test_digest_knows_values_not_their_order() -> None:
    assert cache.digest({"a": 1, "b": 2}) == cache.digest({"b": 2, "a": 1})
    assert cache.digest({"a": 1, "b": 2}) != cache.digest({"a": 2, "b": 1})

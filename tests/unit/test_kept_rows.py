"""Rows kept in the cache folder: made once, by fixed blocks, and never used half."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from dynmoe.lab.kept_rows import KeptRows

TRUTH = np.arange(10 * 6, dtype=np.float32).reshape(10, 2, 3) / 7


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Maker:
    def __init__(self) -> None:
        self.made: list[list[int]] = []

    def __call__(self, places: list[int]) -> np.ndarray:
        self.made.append(places)
        return TRUTH[places]


def kept(block: int = 1, dtype: type = np.float32) -> KeptRows:
    return KeptRows("some/name", 10, (2, 3), dtype, block)


def test_rows_are_made_once_whoever_asks() -> None:
    make, one, other = Maker(), kept(), kept()
    assert np.array_equal(one.rows([7, 2, 7], make), TRUTH[[7, 2, 7]])
    assert np.array_equal(other.rows([2, 3], make), TRUTH[[2, 3]])
    assert np.array_equal(copy.deepcopy(one).rows([3, 7], make), TRUTH[[3, 7]])
    assert make.made == [[2], [7], [3]]
    assert [p.name for p in one.path.parent.iterdir()] == ["name.npy"]
    assert one.rows([], make).shape == (0, 2, 3)


def test_blocks_have_fixed_places_and_values_the_arrays_dtype() -> None:
    make = Maker()
    rows = kept(4, np.float16)
    assert np.array_equal(rows.rows([9, 5], make), TRUTH[[9, 5]].astype(np.float16))
    assert make.made == [[4, 5, 6, 7], [8, 9]]
    assert np.array_equal(rows.rows(range(10), make), TRUTH.astype(np.float16))
    assert make.made[2:] == [[0, 1, 2, 3]]


def test_what_an_interruption_left_half_is_made_again() -> None:
    make, rows = Maker(), kept()
    rows.rows(range(10), make)
    data = bytearray(rows.path.read_bytes())
    data[-3] ^= 1  # in the last row's values
    rows.path.write_bytes(data)
    make.made.clear()
    assert np.array_equal(kept().rows(range(10), make), TRUTH) and make.made == [[9]]

    def broken(places: list[int]) -> np.ndarray:
        if places == [2]:
            raise KeyboardInterrupt
        return TRUTH[places]

    fresh = KeptRows("interrupted", 10, (2, 3), np.float32)
    with pytest.raises(KeyboardInterrupt):
        fresh.rows(range(10), broken)
    make.made.clear()
    assert np.array_equal(
        KeptRows("interrupted", 10, (2, 3), np.float32).rows(range(10), make), TRUTH
    )
    assert make.made == [[n] for n in range(2, 10)]


def test_a_damaged_file_and_a_folder_without_leave_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b"", b"nonsense", b"\x93NUMPY\x01\x00"):
        path = kept().path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert np.array_equal(kept().rows([1], Maker()), TRUTH[[1]])
        assert "making it again" in capsys.readouterr().err
    other = KeptRows("some/name", 10, (2, 4), np.float32)  # never under one name; yet no harm
    assert other.rows([0], lambda _: np.ones((1, 2, 4))).shape == (1, 2, 4)
    rows = kept()
    rows.rows([1], Maker())
    rows.path.unlink()  # as a disk that cannot be written to
    assert np.array_equal(rows.rows([2, 3], Maker()), TRUTH[[2, 3]])
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rows, make = kept(), Maker()
    assert np.array_equal(rows.rows([1, 1], make), TRUTH[[1, 1]]) and make.made == [[1]]
    assert "going on without it" in capsys.readouterr().err

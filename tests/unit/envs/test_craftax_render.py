"""The renderer's two backends against upstream's frames and against each other."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import states
import torch
from torch import Tensor

from envs.craftax_code import FULL, NOT_VISIBLE, layout
from envs.craftax_render import Renderer
from envs.craftax_textures import ARROWS, tables

GAMES = pytest.mark.parametrize("classic", [False, True], ids=["full", "classic"])
BACKENDS = pytest.mark.parametrize("backend", ["numba", "torch"])
WORST = 1e-6
"""greatest error of a float32 value in 0..1"""
HALF = 0.5 + 1e-3
"""greatest distance of a uint8 value from 255 times upstream's"""


@functools.cache
def renderer(classic: bool, backend: str) -> Renderer:
    return Renderer(classic, "cpu", backend)


def random_codes(classic: bool, count: int, seed: int) -> Tensor:
    """Codes that no game need ever reach: each field independent of the others."""
    rng = np.random.default_rng(seed)
    where, table = layout(classic), tables(classic)
    view = where.rows * where.columns
    starts = np.unique(table.start)  # of the black cell after the tiles, then of each hud slot
    sizes = dict(zip(starts, np.diff([*starts, len(table.cells)]), strict=True))
    most = [sizes[table.start[place]] for place in table.place]
    if not classic:
        most[list(table.place).index(ARROWS)], most[-1] = 100, 3
    made = {
        "light": rng.random((count, view), np.float32).view(np.uint8),
        "daylight": rng.choice(np.array([0, 0.3, 0.5, 0.9, 1], np.float32), (count, 1)),
        "key": rng.integers(0, 256, (count, 8)),
        "tiles": rng.integers(0, starts[0], (count, view)),
        "sprites": rng.integers(0, len(table.keep) - 1, (count, where.fields["sprites"])),
        "cells": rng.choice([*range(view), *[NOT_VISIBLE] * 20], (count, where.fields["cells"])),
        "hud": rng.integers(0, most, (count, len(most))),
        "asleep": rng.integers(0, 2, (count, 1)),
        "padding": np.zeros((count, where.fields["padding"])),
    }
    made["daylight"] = made["daylight"].view(np.uint8)
    parts = [made[name].astype(np.uint8) for name in where.fields]
    return torch.from_numpy(np.concatenate(parts, axis=1))


@GAMES
@BACKENDS
def test_frames_are_upstreams(classic: bool, backend: str) -> None:
    codes, upstream = states.sample(classic)
    draw = renderer(classic, backend)
    exact = draw.float32(codes)
    assert exact.dtype == torch.float32 and exact.shape == (len(codes), *draw.frame_shape)
    assert np.abs(exact.numpy() - upstream).max() <= WORST
    whole = draw.uint8(codes)
    assert whole.dtype == torch.uint8 and whole.shape == exact.shape
    target = 255.0 * upstream.astype(np.float64)
    assert np.abs(whole.numpy() - target).max() <= HALF
    tie = np.abs(target - np.floor(target) - 0.5) < 1e-3
    assert (whole.numpy() == np.round(target))[~tie].all()
    assert tie.mean() < 0.1


@GAMES
def test_the_sample_shows_all_there_is(classic: bool) -> None:
    codes = states.sample(classic)[0].numpy()
    where, table = layout(classic), tables(classic)
    cells = codes[:, where.part("cells")]
    seen = cells != NOT_VISIBLE
    sprites = codes[:, where.part("sprites")]
    assert set(sprites[:, 0]) == set(range(5))
    assert set(sprites[:, 1:][seen]) == set(range(5, len(table.keep) - 1))
    assert (seen & (cells == cells[:, :1])).sum(axis=1).max() > 2  # mobs upon mobs
    assert len(set(codes[:, where.part("tiles")].ravel())) == (17 if classic else 185)
    day = codes.view(np.float32)[:, where.part("daylight").start // 4]
    asleep = codes[:, where.part("asleep")][:, 0]
    assert ((day < 0.5) & (asleep == 1)).any() and ((day > 0.5) & (day < 1)).any()
    hud = codes[:, where.part("hud")]
    assert (np.unique(day).size > 100) and (hud.min(axis=0) == [0] * hud.shape[1])[1:].all()
    for slot in range(1, 22 if not classic else 16):
        assert set(hud[:, slot]) == set(range(10 if classic else 100)), slot
    if not classic:
        light = codes.view(np.float32)[:, :99]
        assert ((light > 0) & (light < 1)).mean() > 0.05 and (light == 0).any()
        assert set(hud[:, 22]) == set(range(9))  # floors
        assert {tuple(row) for row in hud[:, [21, 36]]} == {
            (count, charm) for count in range(100) for charm in range(3)
        }
        assert [len(set(hud[:, slot])) for slot in range(27, 36)] == [2, 2, 2, 5, 15, 9, 9, 9, 9]


@GAMES
@pytest.mark.parametrize("seed", [1, 2])
def test_backends_agree_on_any_code(classic: bool, seed: int) -> None:
    codes = random_codes(classic, 200, seed)
    first, second = (renderer(classic, backend) for backend in ("numba", "torch"))
    exact = first.float32(codes)
    assert (exact - second.float32(codes)).abs().max() <= WORST
    for whole in (first.uint8(codes), second.uint8(codes)):
        assert (whole - 255 * exact).abs().max() <= HALF
    assert exact.min() >= 0 and exact.max() <= 1 and exact.std() > 0.1


@GAMES
@BACKENDS
def test_any_number_of_frames_in_any_memory(classic: bool, backend: str) -> None:
    draw = renderer(classic, backend)
    codes = random_codes(classic, 700, 3)  # more than are drawn at a time
    whole = draw.uint8(codes)
    assert draw.uint8(codes[:0]).shape == (0, *draw.frame_shape)
    assert draw.float32(codes[:0]).dtype == torch.float32
    assert torch.equal(draw.uint8(codes[1::7]), whole[1::7])
    assert torch.equal(draw.uint8(codes[650:651]), whole[650:651])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(draw.uint8(codes), whole)
    finally:
        torch.set_num_threads(threads)


@GAMES
def test_wrong_codes_are_refused(classic: bool) -> None:
    draw = renderer(classic, "numba")
    assert draw.code_size == layout(classic).size
    wrong = [torch.zeros(2, draw.code_size), torch.zeros(2, 7, dtype=torch.uint8)]
    for codes in [*wrong, torch.zeros(draw.code_size, dtype=torch.uint8)]:
        with pytest.raises(ValueError, match="codes must be uint8"):
            draw.uint8(codes)
    with pytest.raises(ValueError, match="codes must be uint8 .* on cpu, not .* on meta"):
        draw.uint8(torch.zeros(2, draw.code_size, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match="unknown backend 'x'"):
        Renderer(classic, "cpu", "x")


def test_noise_is_jaxs() -> None:
    """To the bit, also for keys with their high bits set."""
    import jax

    from envs.craftax_render import uniform
    from envs.craftax_render_numba import _draw_noise

    keys = np.array([[0, 0], [1, 2], [2**32 - 1, 2**31], [3_000_000_000, 77]], np.uint32)
    wanted = np.stack([jax.random.uniform(jax.numpy.asarray(key), (90, 110)) for key in keys])
    found = uniform(torch.from_numpy(keys.view(np.int32)), 9900)
    assert np.array_equal(found.numpy(), wanted.reshape(4, -1))
    for key, one in zip(keys, wanted, strict=True):
        noise = np.empty(9900, np.float32)
        _draw_noise(key[0], key[1], noise)
        assert np.array_equal(noise, one.ravel())


def test_sleep_and_light_by_hand() -> None:
    """A frame that can be worked out on paper: grass at half light, the player asleep."""
    codes = torch.zeros(1, FULL.size, dtype=torch.uint8)
    floats = codes.view(torch.float32)
    floats[:, :99], floats[:, 99] = 0.5, 1.0
    codes[:, FULL.part("tiles")] = 2 * 5
    codes[:, FULL.part("cells")] = NOT_VISIBLE
    codes[:, FULL.part("asleep")] = 1
    grass = tables(False).cells[10][:, :30].reshape(10, 10, 3)
    frame = renderer(False, "numba").float32(codes)[0].numpy()
    assert np.allclose(frame[:10, :10] * 255, grass * 0.25, atol=1e-4)
    assert (frame[90:] == 0).mean() > 0.9  # the hud of one who has nothing


def test_torch_backend_loads_neither_numba_nor_jax() -> None:
    """A machine with a GPU may lack numba, and tables in the cache save the seconds of jax."""
    tables(True)  # are in the cache now
    code = (
        "import sys, torch; from envs.craftax_render import Renderer;"
        "Renderer(True, 'cpu', 'torch').uint8(torch.zeros(1, 116, dtype=torch.uint8));"
        "print([name for name in ('numba', 'jax', 'craftax') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_tables_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Upstream's own loader, which writes into the package's folder, is left alone."""
    import craftax.craftax_classic

    assets = Path(craftax.craftax_classic.__path__[0]) / "assets"
    before = sorted(assets.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made = tables(True)
    printed = capsys.readouterr()
    assert printed.out == "" and "cannot be written" in printed.err
    assert sorted(assets.iterdir()) == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):  # made, then read
        assert all(np.array_equal(a, b) for a, b in zip(tables(True), made, strict=True))
    assert len(list((tmp_path / "cache" / "dynmoe").glob("craftax-classic-textures-*.npz"))) == 1


def test_numba_without_a_folder_for_its_cache() -> None:
    """A function of no file has no place for compiled code, just like one in read-only folders."""
    from envs.craftax_render_numba import compiled

    space: dict[str, Any] = {}
    exec("def twice(x): return 2 * x", space)
    assert compiled(space["twice"])(3) == 6

"""Craftax's frames from their codes on the CPU, compiled by numba.

One frame at a time: tiles, sprites and hud are put together in the tables' values (uint8, in
Classic float32), then each row of pixels is lit, tinted and written out in one pass. The night's
noise, the costly part, is drawn only where a frame has any.

What the speed hangs on: inner loops whose length the compiler does not know become vector
instructions, while short loops of a known length are unrolled into scalar ones first; and the
rounds of threefry must be inlined by numba itself (11 us a frame instead of 45).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy import float32, uint32
from torch import Tensor

from envs.craftax_code import fields, layout
from envs.craftax_textures import Tables

SHARE = 32
"""least frames that are worth a thread of their own"""


class NumbaDrawer:
    """A `Drawer` of envs.craftax_render for the CPU, with as many threads as torch has."""

    def __init__(self, classic_game: bool, tables: Tables) -> None:
        self._draw = classic if classic_game else full
        self._layout = layout(classic_game)
        self._tables = tables
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="craftax")

    def __call__(self, codes: Tensor, out: Tensor, scale: float, shift: float) -> None:
        """See `Drawer`."""

        def draw(some: Tensor, frames: Tensor) -> None:
            factors = float32(scale), float32(shift)
            self._draw(self._fields(some), self._tables, *factors, frames.numpy())

        rows = out.flatten(2)  # [B, H, W * 3]
        threads = min(torch.get_num_threads(), len(codes) // SHARE)
        if threads > 1:
            list(self._pool.map(draw, codes.tensor_split(threads), rows.tensor_split(threads)))
        else:
            draw(codes, rows)

    def _fields(self, codes: Tensor) -> Fields:
        found = {name: part.numpy() for name, part in fields(codes, self._layout).items()}
        found["key"] = found["key"].view(uint32)
        found.setdefault("light", found["daylight"])  # which Classic does not use
        return Fields(**{name: found[name] for name in Fields._fields})


class Fields(NamedTuple):
    """The fields of B codes, each [B, n], as envs.craftax_code names them."""

    light: np.ndarray
    daylight: np.ndarray
    key: np.ndarray
    tiles: np.ndarray
    sprites: np.ndarray
    cells: np.ndarray
    hud: np.ndarray
    asleep: np.ndarray


def compiled(function: Callable[..., Any]) -> Any:
    """The function compiled at its first call, and kept on disk where a folder can be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return numba.njit(**options)(function)


inlined = numba.njit(inline="always")


@compiled
def full(fields: Fields, tables: Tables, scale: float, shift: float, out: np.ndarray) -> None:
    """Craftax's frames, as scale * (0..255) + shift, into out [B, H, W * 3]."""
    height, width = tables.noise.shape
    columns, side = width // tables.cells.shape[1], tables.cells.shape[1]
    base = np.zeros((out.shape[1], out.shape[2] + tables.cells.shape[2]), np.uint8)
    noise, light = np.empty((height, width), float32), np.empty(width, float32)
    gain, add = np.empty(3 * width, float32), np.empty(3 * width, float32)
    for b in range(out.shape[0]):
        _compose(b, fields, tables, columns, base)
        day = fields.daylight[b, 0]
        factor = float32(0.5 * scale if fields.asleep[b, 0] else scale)
        blue = (float32(1) - day) * float32(0.5) * factor
        for x in range(width):
            add[3 * x] = shift
            add[3 * x + 1] = float32(16) * blue + float32(shift)
            add[3 * x + 2] = float32(64) * blue + float32(shift)
        if day < 0.5:
            _draw_noise(fields.key[b, 0], fields.key[b, 1], noise.reshape(-1))
        for y in range(height):
            if y % side == 0:
                for x in range(width):
                    light[x] = fields.light[b, y // side * columns + x // side]
                    for c in range(3):
                        gain[3 * x + c] = light[x] * (factor * day + blue)
            if day < 0.5:
                mask = (float32(1) - day - day) * tables.noise[y]
                _night_row(base[y], light, noise[y], mask, factor * day, blue, add, out[b, y])
            else:
                _row(base[y], gain, add, out[b, y])
        gain[:] = scale
        add[:] = shift
        for y in range(height, out.shape[1]):
            _row(base[y], gain, add, out[b, y])


@compiled
def classic(fields: Fields, tables: Tables, scale: float, shift: float, out: np.ndarray) -> None:
    """Classic's frames, as scale * (0..255) + shift, into out [B, H, W * 3]."""
    height, width = tables.noise.shape
    columns = width // tables.cells.shape[1]
    base = np.zeros((out.shape[1], out.shape[2] + tables.cells.shape[2]), float32)
    noise = np.zeros((height, width), float32)
    gain, add = np.empty(3 * width, float32), np.empty(3 * width, float32)
    gain[:] = scale
    add[:] = shift
    for b in range(out.shape[0]):
        _compose(b, fields, tables, columns, base)
        day = fields.daylight[b, 0]
        dark = max(float32(1) - day - day, float32(0))
        asleep = float32(fields.asleep[b, 0])
        if dark > 0:
            _draw_noise(fields.key[b, 0], fields.key[b, 1], noise.reshape(-1))
        for y in range(height):
            _classic_row(base[y], noise[y], tables.noise[y], dark, day, asleep)
        for y in range(out.shape[1]):
            _row(base[y], gain, add, out[b, y])


@compiled
def _compose(b: int, fields: Fields, tables: Tables, columns: int, base: np.ndarray) -> None:
    """Tiles, sprites and hud of frame b into base [H, W * 3 + ROW]."""
    side, tiles = tables.cells.shape[1], fields.tiles.shape[1]
    for i in range(tiles):
        y, x = i // columns * side, i % columns * side * 3
        _copy(tables.cells, fields.tiles[b, i], base, y, x)
    for i in range(fields.sprites.shape[1]):
        cell = np.int64(fields.cells[b, i - 1]) if i > 0 else tiles // 2  # the player is first
        if cell < tiles:
            y, x = cell // columns * side, cell % columns * side * 3
            _blend(tables.keep, tables.paint, fields.sprites[b, i], base, y, x)
    shown = tables.start.copy()
    for i in range(tables.place.shape[0]):
        shown[tables.place[i]] += tables.step[i] * np.int32(fields.hud[b, i])
    for i in range(shown.shape[0]):
        y, x = (tiles + i) // columns * side, (tiles + i) % columns * side * 3
        _copy(tables.cells, shown[i], base, y, x)


@compiled
def _copy(cells: np.ndarray, k: int, base: np.ndarray, y: int, x: int) -> None:
    """Cell k [T, ROW] to base's row y, value x; what goes beyond it is overwritten later."""
    for i in range(cells.shape[1]):
        row = base[y + i, x:]  # indices that start at 0 need no check for negative ones
        for j in range(cells.shape[2]):
            row[j] = cells[k, i, j]


@compiled
def _blend(keep: np.ndarray, paint: np.ndarray, k: int, base: np.ndarray, y: int, x: int) -> None:
    """Sprite k [T, ROW] upon base."""
    for i in range(keep.shape[1]):
        row = base[y + i, x:]
        for j in range(keep.shape[2]):
            row[j] = row[j] * keep[k, i, j] + paint[k, i, j]


@compiled
def _row(base: np.ndarray, gain: np.ndarray, add: np.ndarray, out: np.ndarray) -> None:
    """gain * base + add for one row of values; cut to whole numbers where out is uint8."""
    for i in range(out.shape[0]):
        out[i] = base[i] * gain[i] + add[i]


@compiled
def _night_row(
    base: np.ndarray,
    light: np.ndarray,
    noise: np.ndarray,
    mask: np.ndarray,
    day: float,
    blue: float,
    add: np.ndarray,
    out: np.ndarray,
) -> None:
    """One row of Craftax's map with noise: day * p + blue * ((1 - mask) p + mask n) + add."""
    for x in range(light.shape[0]):
        gain = light[x] * (day + blue * (float32(1) - mask[x]))
        glow = blue * mask[x] * (noise[x] * float32(95) + float32(32))
        out[3 * x] = base[3 * x] * gain + (glow + add[0])
        out[3 * x + 1] = base[3 * x + 1] * gain + (glow + add[1])
        out[3 * x + 2] = base[3 * x + 2] * gain + (glow + add[2])


@compiled
def _classic_row(
    base: np.ndarray,
    noise: np.ndarray,
    strength: np.ndarray,
    dark: float,
    day: float,
    asleep: float,
) -> None:
    """Night and sleep over one row of Classic's map, in place."""
    night, awake = float32(1) - day, float32(1) - asleep
    for x in range(noise.shape[0]):
        r, g, b = base[3 * x], base[3 * x + 1], base[3 * x + 2]
        mask = strength[x] * dark
        keep, glow = float32(1) - mask, mask * (noise[x] * float32(95) + float32(32))
        grey = float32(0.3) * (_grey(r, g, b) * keep + glow)
        # half of (0.4 p + 0.6 grey), half of the blue (0, 16, 64)
        r = day * r + night * (float32(0.2) * (r * keep + glow) + grey)
        g = day * g + night * (float32(0.2) * (g * keep + glow) + grey + float32(8))
        b = day * b + night * (float32(0.2) * (b * keep + glow) + grey + float32(32))
        grey = asleep * float32(0.5) * _grey(r, g, b)
        base[3 * x] = awake * r + grey
        base[3 * x + 1] = awake * g + grey
        base[3 * x + 2] = awake * b + grey + asleep * float32(8)


@inlined
def _grey(red: float32, green: float32, blue: float32) -> float32:
    return float32(0.299) * red + float32(0.587) * green + float32(0.114) * blue


@compiled
def _draw_noise(key0: uint32, key1: uint32, noise: np.ndarray) -> None:
    """`noise` [n] becomes jax.random.uniform(key, (n,)).

    Threefry-2x32 with 20 rounds (Salmon et al., 2011) of the counter (0, i), both words xored, as
    JAX does with jax_threefry_partitionable. The upper 23 bits make a number in 0..1.
    """
    key2 = uint32(key0 ^ key1 ^ uint32(0x1BD11BDA))
    for i in range(noise.shape[0]):
        a, b = key0, uint32(uint32(i) + key1)
        a, b = _four_rounds(a, b, 13, 15, 26, 6)
        a, b = _four_rounds(uint32(a + key1), uint32(b + key2 + uint32(1)), 17, 29, 16, 24)
        a, b = _four_rounds(uint32(a + key2), uint32(b + key0 + uint32(2)), 13, 15, 26, 6)
        a, b = _four_rounds(uint32(a + key0), uint32(b + key1 + uint32(3)), 17, 29, 16, 24)
        a, b = _four_rounds(uint32(a + key1), uint32(b + key2 + uint32(4)), 13, 15, 26, 6)
        bits = uint32(a + key2) ^ uint32(b + key0 + uint32(5))
        noise[i] = float32(np.int32(bits >> uint32(9))) * float32(2.0**-23)


@inlined
def _four_rounds(a: uint32, b: uint32, r0: int, r1: int, r2: int, r3: int) -> tuple[uint32, uint32]:
    a = uint32(a + b)
    b = _rotated(b, r0) ^ a
    a = uint32(a + b)
    b = _rotated(b, r1) ^ a
    a = uint32(a + b)
    b = _rotated(b, r2) ^ a
    a = uint32(a + b)
    return a, _rotated(b, r3) ^ a


@inlined
def _rotated(bits: uint32, by: int) -> uint32:
    return uint32(bits << uint32(by)) | uint32(bits >> uint32(32 - by))

"""What agents.tiles does for each frame, compiled by numba for the CPU.

Shapes: B frames of R x Q tiles, each T x T pixels; U distinct tiles; C channels; a response of a
tile is S x S positions, S = T + 2 REACH; h x w pooled positions.

What the speed hangs on: inner loops run over channels, or over a whole row of a response, so that
they become vector instructions; their lengths must not be known to the compiler, which would make
scalar ones of short loops.
"""

from __future__ import annotations

import numpy as np
from numpy import int32, uint32

from envs.craftax_render_numba import compiled, inlined

REACH = 2
"""how far a 5x5 kernel reaches beyond its centre"""
POOL = 3
"""width of a pooled window"""


@compiled
def hashes(frames: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """A number for each tile of frames [B, H, W * 3], into out [B, R, Q] int64.

    It is the sum of the tile's bytes times `weights` [T, T * 3] uint32, modulo 2^32.
    """
    side, wide = weights.shape
    for b in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                total = uint32(0)
                for y in range(side):
                    row, factors = frames[b, i * side + y, j * wide :], weights[y]
                    for x in range(wide):
                        total += uint32(row[x]) * factors[x]
                out[b, i, j] = total


@compiled
def same(frames: np.ndarray, tiles: np.ndarray, ids: np.ndarray) -> bool:
    """Whether frames [B, H, W * 3] are made of tiles [U, T, T * 3] as ids [B, R, Q] say."""
    side, wide = tiles.shape[1:]
    for b in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            for j in range(ids.shape[2]):
                for y in range(side):
                    row, tile = frames[b, i * side + y, j * wide :], tiles[ids[b, i, j], y]
                    others = 0
                    for x in range(wide):
                        others += row[x] != tile[x]
                    if others:
                        return False
    return True


@compiled
def pooled(
    table: np.ndarray,
    bias: np.ndarray,
    above: int,
    ids: np.ndarray,
    out: np.ndarray,
    which: np.ndarray,
) -> None:
    """Sums of responses and the bias, and of each 3x3 window the largest.

    Args:
        table: [U, S, S * C], what each tile adds around itself.
        bias: [C].
        above: rows of pixels above the first window.
        ids: [B, R, Q], the tile at each place.
        out: [B, h, w, C], the largest.
        which: [B, h, w, C] uint8, where in the window that is, row by row 0..8.
    """
    channels, reach = bias.shape[0], REACH * bias.shape[0]
    side, width = table.shape[1] - 2 * REACH, out.shape[2] * POOL * bias.shape[0]
    start = np.empty((ids.shape[2] * side + 2 * REACH) * channels, table.dtype)
    for x in range(start.shape[0]):
        start[x] = bias[x % channels]
    lines = np.empty((POOL, start.shape[0]), table.dtype)
    window = (out.shape[2], POOL, channels)
    for b in range(out.shape[0]):
        for i in range(out.shape[1]):
            for dy in range(POOL):
                _copy(lines[dy], start)
                _sum_row(table, ids[b], above + POOL * i + dy, lines[dy])
            first = lines[0, reach : reach + width].reshape(window)
            second = lines[1, reach : reach + width].reshape(window)
            third = lines[2, reach : reach + width].reshape(window)
            _largest(first, second, third, out[b, i], which[b, i])


@compiled
def spread(
    above: int, gradient: np.ndarray, which: np.ndarray, ids: np.ndarray, table: np.ndarray
) -> None:
    """The gradient [B, h, w, C] of what `pooled` gave, added to that of its table [U, S, S * C]."""
    channels, side = gradient.shape[3], table.shape[1] - 2 * REACH
    reach, width = REACH * channels, gradient.shape[2] * POOL * channels
    lines = np.zeros((POOL, (ids.shape[2] * side + 2 * REACH) * channels), table.dtype)
    window = (gradient.shape[2], POOL, channels)
    for b in range(gradient.shape[0]):
        for i in range(gradient.shape[1]):
            for dy in range(POOL):
                line = lines[dy, reach : reach + width].reshape(window)
                _chosen(gradient[b, i], which[b, i], int32(POOL * dy), line)
                _take_row(table, ids[b], above + POOL * i + dy, lines[dy])


@compiled
def _sum_row(table: np.ndarray, ids: np.ndarray, y: int, line: np.ndarray) -> None:
    """Add the responses of all tiles that reach row y to a line [(W + 2 REACH) * C]."""
    side = table.shape[1] - 2 * REACH
    step = table.shape[2] // table.shape[1] * side
    for i in range(max(y - REACH, 0) // side, min((y + REACH) // side + 1, ids.shape[0])):
        for j in range(ids.shape[1]):
            _add(line[j * step :], table[ids[i, j], y - i * side + REACH])


@compiled
def _take_row(table: np.ndarray, ids: np.ndarray, y: int, line: np.ndarray) -> None:
    """Add a line [(W + 2 REACH) * C] to the entries of all tiles that reach row y."""
    side = table.shape[1] - 2 * REACH
    step = table.shape[2] // table.shape[1] * side
    for i in range(max(y - REACH, 0) // side, min((y + REACH) // side + 1, ids.shape[0])):
        for j in range(ids.shape[1]):
            entry = table[ids[i, j], y - i * side + REACH]
            _add(entry, line[j * step : j * step + entry.shape[0]])


@compiled
def _copy(line: np.ndarray, values: np.ndarray) -> None:
    for x in range(values.shape[0]):
        line[x] = values[x]


@compiled
def _add(line: np.ndarray, values: np.ndarray) -> None:
    """Add values [n] to the first n of the line."""
    for x in range(values.shape[0]):
        line[x] += values[x]


@inlined
def _larger(best: float, k: int32, value: float, number: int) -> tuple[float, int32]:
    """The larger of two values, and its number."""
    return (value, int32(number)) if value > best else (best, k)


@compiled
def _largest(
    first: np.ndarray, second: np.ndarray, third: np.ndarray, out: np.ndarray, which: np.ndarray
) -> None:
    """The largest of each window of three rows [w, 3, C], into out [w, C], and its number.

    Written out, because loops over the nine would keep the compiler from vector instructions.
    """
    for j in range(out.shape[0]):
        for c in range(out.shape[1]):
            best, k = first[j, 0, c], int32(0)
            best, k = _larger(best, k, first[j, 1, c], 1)
            best, k = _larger(best, k, first[j, 2, c], 2)
            best, k = _larger(best, k, second[j, 0, c], 3)
            best, k = _larger(best, k, second[j, 1, c], 4)
            best, k = _larger(best, k, second[j, 2, c], 5)
            best, k = _larger(best, k, third[j, 0, c], 6)
            best, k = _larger(best, k, third[j, 1, c], 7)
            best, k = _larger(best, k, third[j, 2, c], 8)
            out[j, c] = best
            which[j, c] = k


@compiled
def _chosen(gradient: np.ndarray, which: np.ndarray, before: int, line: np.ndarray) -> None:
    """The gradient [w, C] where `which` [w, C] is the place in a line [w, 3, C], else 0."""
    for j in range(gradient.shape[0]):
        for c in range(gradient.shape[1]):
            k, value = int32(which[j, c]) - before, gradient[j, c]
            line[j, 0, c] = value if k == 0 else 0
            line[j, 1, c] = value if k == 1 else 0
            line[j, 2, c] = value if k == 2 else 0

"""A first convolution that computes what its frames repeat once.

Frames of games are often made of tiles: Craftax's 143 come from a few hundred pictures. As a
convolution is linear, the response to a frame is the sum of the responses to its tiles, each of
which reaches two pixels beyond the tile. Here the distinct tiles of a batch of frames are found by
their pixels, the convolution is computed for those alone, and each output is looked up, summed and
pooled in one pass. This is exact: the dense convolution but for the order of sums. The gradient
goes the same way back, to the table of responses, and on to the kernel as in any convolution.

Mobs, light and the inventory only make more distinct tiles. Night noise makes every tile of the map
one of its own; it takes the dense pass, and only the inventory below it is put together from tiles.
All takes the dense pass on an accelerator, and so do float frames.

Shapes: B frames of R x Q tiles, T x T pixels each; U distinct tiles; C channels; h x w pooled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Part = TypeVar("Part")
REACH = 2
POOL = 3
REPEATED = 0.5
"""least share of a frame's tiles that must be elsewhere as well; else it is noisy"""
MOST = 0.25
"""most positions of responses, as a share of the frames' pixels; beyond it all take the dense pass,
which is cheaper per position"""


class TiledConvolution(nn.Conv2d):
    """A 5x5 convolution and 3x3 max pooling, [B, 3, H, W] -> [B, C, H // 3, W // 3].

    Its parameters are those of `nn.Conv2d(channels, out, 5, padding=2)`.

    Args:
        channels, out: of the input and the output.
        tile: T, the side of a tile in pixels.
    """

    def __init__(self, channels: int, out: int, tile: int) -> None:
        super().__init__(channels, out, 2 * REACH + 1, padding=REACH)
        self.tile = tile

    def forward(self, x: Tensor) -> Tensor:
        """Of frames [B, 3, H, W], uint8 in 0..255 or floats in 0..1: [B, C, H // 3, W // 3]."""
        if x.dtype != torch.uint8 or x.device.type != "cpu":
            return self.dense(x)
        ids, tiles, repeated, below = distinct_tiles(x, self.tile)
        if not repeated.any():
            return self._noisy(x, below)
        if self._too_many(tiles, ids):
            return self.dense(x)
        summed = self._from_tiles(tiles, ids)
        if repeated.all():
            return summed
        parts = torch.cat([summed, self._noisy(x[~repeated], below).to(summed.dtype)])
        order = torch.cat([repeated.nonzero(), (~repeated).nonzero()]).squeeze(1).argsort()
        images = parts.permute(0, 2, 3, 1)  # as they lie in memory; indexing parts is slow backward
        return images.index_select(0, order).permute(0, 3, 1, 2)

    def _noisy(self, x: Tensor, below: int) -> Tensor:
        """The same of frames of which only the last `below` rows of tiles repeat."""
        top = x.shape[2] - below * self.tile
        windows = math.ceil((top + REACH) / POOL)  # those that pixels above may reach
        if not below or windows >= x.shape[2] // POOL:
            return self.dense(x)
        ids, tiles, repeated, _ = distinct_tiles(x[:, :, top:], self.tile)
        if not repeated.all() or self._too_many(tiles, ids):
            return self.dense(x)
        above = self.dense(x[:, :, : windows * POOL + REACH])
        status = self._from_tiles(tiles, ids, windows * POOL - top)
        parts = (part.permute(0, 2, 3, 1) for part in (above.to(status.dtype), status))
        return torch.cat(tuple(parts), 1).permute(0, 3, 1, 2)

    def _from_tiles(self, tiles: Tensor, ids: Tensor, first: int = 0) -> Tensor:
        """Of tiles [U, 3, T, T] at ids [B, R, Q], from a row of pixels on: [B, C, h, w]."""
        responses = F.conv2d(self._scaled(tiles), self.weight, padding=2 * REACH)
        bias = self.bias if self.bias is not None else self.weight.new_zeros(len(self.weight))
        summed: Tensor = SummedAndPooled.apply(responses.to(bias.dtype), bias, ids, first)
        return summed

    def _too_many(self, tiles: Tensor, ids: Tensor) -> bool:
        """Whether the dense pass of frames with these ids [B, R, Q] is cheaper."""
        positions = len(tiles) * (self.tile + 2 * REACH) ** 2
        return positions > MOST * ids.numel() * self.tile**2

    def dense(self, x: Tensor) -> Tensor:
        """The same from pixels: [B, 3, H, W] to [B, C, H // 3, W // 3]."""
        return F.max_pool2d(super().forward(self._scaled(x)), POOL)

    def _scaled(self, x: Tensor) -> Tensor:
        """Floats in 0..1, with the precision of the weights or of autocast."""
        if x.dtype != torch.uint8:
            return x
        half = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if half else self.weight.dtype
        return x.to(dtype) / 255


class SummedAndPooled(torch.autograd.Function):
    """Responses of tiles [U, C, S, S], S = T + 4, a bias [C] and ids [B, R, Q] -> [B, C, h, w].

    Windows begin at a row of pixels, `first`: 0, or REACH and more where other tiles lie above.
    """

    @staticmethod
    def forward(ctx: Any, responses: Tensor, bias: Tensor, ids: Tensor, first: int) -> Tensor:
        """Sum each tile's response to those around it, add the bias, take each window's largest.

        Shapes are the class's: [U, C, S, S], [C] and [B, R, Q] to [B, C, h, w].
        """
        from agents import tile_kernels

        table = _as_table(responses)
        side = responses.shape[-1] - 2 * REACH
        rows, columns = (ids.shape[1] * side - first) // POOL, ids.shape[2] * side // POOL
        out = bias.new_empty(len(ids), rows, columns, len(bias))
        which = torch.empty(out.shape, dtype=torch.uint8)

        def some(part: slice) -> None:
            arrays = (x[part].numpy() for x in (ids, out, which))
            tile_kernels.pooled(table.numpy(), bias.detach().numpy(), first, *arrays)

        _in_threads(some, len(ids))
        ctx.save_for_backward(ids, which)
        ctx.table, ctx.first = responses.shape, first
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """To the responses [U, C, S, S] and the bias [C]; the gradient is [B, C, h, w]."""
        from agents import tile_kernels

        ids, which = ctx.saved_tensors
        count, channels, side, _ = ctx.table
        gradient = gradients[0].permute(0, 2, 3, 1).contiguous()

        def some(part: slice) -> Tensor:
            table = gradient.new_zeros(count, side, side * channels)
            arrays = (x[part].numpy() for x in (gradient, which, ids))
            tile_kernels.spread(ctx.first, *arrays, table.numpy())
            return table

        tables = _in_threads(some, len(ids))
        table = torch.stack(tables).sum(0) if len(tables) > 1 else tables[0]
        responses = table.view(count, side, side, channels).permute(0, 3, 1, 2)
        return responses, gradient.sum((0, 1, 2)), None, None


def distinct_tiles(x: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """What frames [B, C, H, W] uint8 are made of.

    Returns:
        ids [B', R, Q] int32, of the tile at each place of the frames that repeat tiles;
        tiles [U, C, T, T] uint8; [B] bool, which frames those are; and how many of the last rows
        of tiles repeat in the others.
    """
    from agents import tile_kernels

    pixels = x.permute(0, 2, 3, 1).contiguous().flatten(2)
    count, rows, columns = len(x), x.shape[2] // side, x.shape[3] // side
    hashes = torch.empty(count, rows, columns, dtype=torch.int64)
    weights = _weights(side, side * x.shape[1])
    tile_kernels.hashes(pixels.numpy(), weights, hashes.numpy())
    numbers, ids, counts = hashes.unique(return_inverse=True, return_counts=True)
    elsewhere = (counts[ids] > 1).float()
    repeated, below = elsewhere.mean((1, 2)) >= REPEATED, 0
    if not repeated.all():
        shares = elsewhere[~repeated].mean((0, 2)) >= REPEATED
        below = int(shares.flip(0).cumprod(0).sum())
        pixels = pixels[repeated]
        numbers, ids = hashes[repeated].unique(return_inverse=True)
    places = torch.empty(len(numbers), dtype=torch.int64)
    places[ids.flatten()] = torch.arange(ids.numel())
    cut = pixels.view(-1, rows, side, columns, side * x.shape[1]).transpose(2, 3)
    frame, row, column = torch.unravel_index(places, ids.shape)
    tiles = cut[frame, row, column]
    ids = ids.to(torch.int32)
    if not tile_kernels.same(pixels.numpy(), tiles.numpy(), ids.numpy()):
        nothing = torch.zeros(count, dtype=torch.bool)  # two tiles share a hash: once in years
        return ids[:0], tiles[:0].view(0, x.shape[1], side, side), nothing, 0
    return ids, tiles.view(-1, side, side, x.shape[1]).permute(0, 3, 1, 2), repeated, below


def _as_table(responses: Tensor) -> Tensor:
    """Responses [U, C, S, S] as [U, S, S * C]."""
    return responses.detach().permute(0, 2, 3, 1).contiguous().flatten(2)


@cache
def _weights(rows: int, columns: int) -> np.ndarray:
    """Odd random factors of a tile's bytes in its hash, uint32."""
    return np.random.default_rng(0).integers(2**31, size=(rows, columns), dtype=np.uint32) * 2 + 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tiles")


def _in_threads(function: Callable[[slice], Part], count: int) -> list[Part]:
    """`function` of equal parts of 0..count, as many at once as torch has threads."""
    threads = max(1, min(torch.get_num_threads(), count // 8))
    ends = [count * i // threads for i in range(threads + 1)]
    parts = [slice(*ends[i : i + 2]) for i in range(threads)]
    return [function(parts[0])] if threads == 1 else list(_pool().map(function, parts))

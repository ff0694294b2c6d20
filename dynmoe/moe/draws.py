"""Random numbers: initial values, and noise in forward passes.

Initial values are drawn from a generator or, where it is None, from torch's global one, on the
generator's device (the CPU for the global one) in torch's default dtype, then converted: a seed
gives the same weights on every device. Tensors on the meta device have no values: nothing is drawn
for them.

Noise belongs to a module: it is saved with it, and the same on every device. torch's generators
cannot be traced by torch.compile, and their state is no tensor. So every number is a hash of a
seed, the optimizer step, the draw within the step and the place within the draw. Compiled graphs
draw the same numbers as eager code, and a pass that is recomputed (see `dynmoe.moe.passes`) draws
the same numbers again.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from dynmoe.moe.passes import Passes, new_pass, one_batch, places

Runs = list[tuple[int, tuple[int, int]]]
"""(place in an index, (first entry, length)) of each run of entries that count up by ones"""


def home(generator: torch.Generator | None) -> torch.device:
    """The device on which numbers are drawn, whatever torch's default device is."""
    return torch.device("cpu") if generator is None else generator.device


@torch.no_grad()
def draw_uniform(values: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill a tensor of any shape with draws uniform in +-bound."""
    if values.is_meta:
        return
    fresh = torch.empty(values.shape, device=home(generator))
    values.copy_(fresh.uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def draw_entries(
    parameter: Tensor, axis: int, index: Tensor, bound: float, generator: torch.Generator | None
) -> None:
    """Fill the entries `index` [n] along `axis` with draws uniform in +-bound."""
    if parameter.is_meta:
        return
    runs, plain = as_runs(index, parameter), parameter.dtype == torch.get_default_dtype()
    if len(runs) == 1 and plain and home(generator).type == "cpu":
        [(_, run)] = runs
        parameter.narrow(axis, *run).uniform_(-bound, bound, generator=generator)
        return
    shape = list(parameter.shape)
    shape[axis] = len(index)
    fresh = torch.empty(shape, device=home(generator))
    fresh.uniform_(-bound, bound, generator=generator)
    set_entries(parameter, axis, index, fresh.to(parameter))


@torch.no_grad()
def draw_normal(rows: Tensor, index: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill the rows `index` [n] with normal draws of mean 0 and that standard deviation."""
    if rows.is_meta:
        return
    shape = (len(index), *rows.shape[1:])
    fresh = std * torch.randn(shape, generator=generator, device=home(generator))
    rows.index_copy_(0, index.to(rows.device), fresh.to(rows))


@torch.no_grad()
def draw_seed(seed: Tensor, generator: torch.Generator | None) -> None:
    """Fill a tensor of int64, of any shape, with seeds, each between 0 and 2^62."""
    if seed.is_meta:
        return
    seed.copy_(torch.randint(2**62, seed.shape, generator=generator, device=home(generator)))


def every(rows: Tensor) -> Tensor:
    """[n] the index of every row of a tensor [n, ...]."""
    return torch.arange(len(rows), device=rows.device)


def set_entries(
    tensor: Tensor, axis: int, index: Tensor, values: Tensor, runs: Runs | None = None
) -> None:
    """Write `values` to the entries `index` [n] along `axis`; a scalar tensor fills them all.

    `runs`: the index as `as_runs` gives it.
    """
    if runs is None:
        runs = as_runs(index, tensor) if axis else []  # rows are long enough by themselves
    for place, (first, length) in runs:
        target = tensor.narrow(axis, first, length)
        target.copy_(values.narrow(axis, place, length) if values.dim() else values)
    if runs:
        return
    index = index.to(tensor.device)
    if axis != 0 and tensor.device.type == "cpu":  # faster there than a fill or copy by index
        shape = list(tensor.shape)
        shape[axis] = len(index)
        spread = index.view(-1, *[1] * (tensor.dim() - 1 - axis)).expand(shape)
        tensor.scatter_(axis, spread, values.expand(shape))
    elif values.dim() == 0:
        tensor.index_fill_(axis, index, values)
    else:
        tensor.index_copy_(axis, index, values)


def take_entries(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """A copy of the entries `index` [n] along `axis`."""
    runs = as_runs(index, tensor) if axis else []
    if runs:
        return torch.cat([tensor.narrow(axis, *run) for _, run in runs], dim=axis)
    return tensor.index_select(axis, index.to(tensor.device))


def as_runs(index: Tensor, tensor: Tensor) -> Runs:
    """An index [n] as runs of entries that count up by ones.

    Only for tensors on the CPU, where slices are several times as fast as an index; elsewhere the
    look would wait for the device. Empty where runs are shorter than 8 on average, too.
    """
    if not index.numel() or index.device.type != "cpu" or tensor.device.type != "cpu":
        return []
    entries = index.numpy()
    breaks = np.flatnonzero(np.diff(entries) != 1) + 1
    if 8 * len(breaks) > len(entries):
        return []
    starts = [0, *breaks.tolist(), len(entries)]
    return [(a, (int(entries[a]), b - a)) for a, b in pairwise(starts)]


def seeded_linear(
    dim_in: int, dim_out: int, generator: torch.Generator | None, bias: bool = True
) -> nn.Linear:
    """A linear map `[..., dim_in] -> [..., dim_out]`, uniform in +-1/sqrt(dim_in) as torch's own.

    With a generator torch's global one is neither read nor moved.
    """
    device = torch.get_default_device()
    linear = nn.utils.skip_init(nn.Linear, dim_in, dim_out, bias=bias, device=device)
    draw_linear(linear, generator)
    return linear


def draw_linear(linear: nn.Linear, generator: torch.Generator | None) -> None:
    """Draw the weights of a linear map as `seeded_linear` does."""
    for parameter in linear.parameters():
        draw_uniform(parameter, linear.in_features**-0.5, generator)


GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
WITHOUT_GRADIENT = 2**40
"""Passes without gradient are counted from here, so that acting leaves training's numbers alone."""


class Noise(nn.Module):
    """A stream of random numbers for forward passes.

    In evaluation mode it is silent: `uniform` gives 0.5, `normal` 0, and nothing is counted.

    Attributes:
        seed: buffer [1] int64, drawn from the generator given.
        step: buffer [1] int64, optimizer steps so far (see `dynmoe.moe.finish_step`).
        drawn: buffer [2] int64, draws in this step, in passes with and without gradient; not saved.
    """

    seed: Tensor
    step: Tensor
    drawn: Tensor

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.register_buffer("seed", torch.empty(1, dtype=torch.long))
        self.register_buffer("step", torch.empty(1, dtype=torch.long))
        self.register_buffer("drawn", torch.empty(2, dtype=torch.long), persistent=False)
        self._passes = Passes()
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again with a new seed."""
        draw_seed(self.seed, generator)
        self.step.zero_()
        self._forget()

    def uniform(self, like: Tensor, by_row: bool = True) -> Tensor:
        """Numbers between 0 and 1, of the shape, dtype and device of `like`.

        Args:
            like: [N, ...].
            by_row: its rows are those of the batch; False: they are the same for all of it, and
                alike on all processes that share it.
        """
        return self._draw(like, by_row).to(like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of the shape, dtype and device of `like` (inverse of erf)."""
        return (math.sqrt(2.0) * torch.erfinv(2.0 * self._draw(like) - 1.0)).to(like.dtype)

    def finish_step(self) -> None:
        """An optimizer step is done; without a draw since the last one nothing changes."""
        self.step += self.drawn.any()
        self._forget()

    def _forget(self) -> None:
        self.drawn.zero_()
        self._passes.clear()

    def _draw(self, like: Tensor, by_row: bool = True) -> Tensor:
        """Numbers inside (0, 1) in float32 or wider, from hashes of consecutive integers."""
        wide = torch.promote_types(like.dtype, torch.float32)
        if not self.training:
            return torch.full_like(like, 0.5, dtype=wide)
        order = self._passes.recall(new_pass(), self._next)
        key = scramble(scramble(self.seed + self.step * GOLDEN) + order * GOLDEN)
        place = torch.arange(1, like.numel() + 1, device=like.device)
        if by_row and one_batch() and len(like):  # those of the whole batch
            first = places(len(like), like.device) * like[0].numel()
            place = (first[:, None] + place[: like[0].numel()]).flatten()
        z = scramble(key + place * GOLDEN)
        # With 23 bits and a half, float32 holds every value exactly and none is 0 or 1.
        return ((_shift(z, 41).to(wide) + 0.5) * 2.0**-23).view(like.shape)

    def _next(self) -> Tensor:
        """[1] which draw of this step comes now."""
        lane = 0 if torch.is_grad_enabled() else 1
        order = self.drawn[lane : lane + 1] + lane * WITHOUT_GRADIENT
        self.drawn[lane] += 1
        return order


def scramble(z: Tensor) -> Tensor:
    """Hash int64 numbers of any shape: SplitMix64's output function.

    Steele et al. 2014, "Fast splittable pseudorandom number generators", Figure 17.
    """
    z = (z ^ _shift(z, 30)) * MIX[0]
    z = (z ^ _shift(z, 27)) * MIX[1]
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)

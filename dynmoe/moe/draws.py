"""Initial values, drawn from a generator or, where it is None, from torch's global one.

Numbers are drawn on the generator's device (the CPU for the global one) in torch's default dtype,
then converted: a seed gives the same weights on every device. Tensors on the meta device have
no values: nothing is drawn for them.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

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
    """Fill a tensor of int64 with seeds, each between 0 and 2^62."""
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

    `runs` is the index as `as_runs` gives it, for callers that write to several tensors.
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

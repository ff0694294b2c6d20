"""Initial values, drawn from a generator or, where it is None, from torch's global one.

Numbers are drawn on the generator's device (the CPU for the global one) in torch's default dtype,
then converted: a seed gives the same weights on every device. Tensors on the meta device have
no values: nothing is drawn for them.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    run, plain = as_run(index, parameter), parameter.dtype == torch.get_default_dtype()
    if run and plain and home(generator).type == "cpu":
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


def set_entries(tensor: Tensor, axis: int, index: Tensor, values: Tensor) -> None:
    """Write `values` to the entries `index` [n] along `axis`; a scalar tensor fills them all."""
    index = index.to(tensor.device)
    if axis != 0 and (run := as_run(index, tensor)):
        tensor.narrow(axis, *run).copy_(values)
    elif axis != 0 and tensor.device.type == "cpu":  # faster there than a fill or copy by index
        shape = list(tensor.shape)
        shape[axis] = len(index)
        place = index.view(-1, *[1] * (tensor.dim() - 1 - axis)).expand(shape)
        tensor.scatter_(axis, place, values.expand(shape))
    elif values.dim() == 0:
        tensor.index_fill_(axis, index, values)
    else:
        tensor.index_copy_(axis, index, values)


def as_run(index: Tensor, tensor: Tensor) -> tuple[int, int] | None:
    """(first, length) of an index on the CPU that counts up by ones, for tensors on the CPU."""
    count = index.numel()
    if not count or index.device.type != "cpu" or tensor.device.type != "cpu":
        return None  # elsewhere the look would wait for the device
    first, last = int(index[0]), int(index[-1])
    if last - first != count - 1 or not torch.equal(index, torch.arange(first, last + 1)):
        return None
    return first, count

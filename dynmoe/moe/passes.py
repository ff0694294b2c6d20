"""Forward passes of one optimizer step: each is counted once, and over all processes.

Activation checkpointing runs a layer's forward pass again in the backward pass. Whoever draws noise
or notes something in a pass therefore takes a number from torch's global CPU generator first. Both
kinds of `torch.utils.checkpoint` restore that generator before they recompute, as dropout needs it,
so the recomputed pass gets the same numbers. (`preserve_rng_state=False` gives that up.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

MOST_PASSES = 1024
"""Passes without an optimizer step after which the older ones are forgotten, with a warning."""


def new_pass() -> int | None:
    """A number for this pass, another one in every pass but those that are recomputed.

    None in a graph that is being compiled: the compiler recomputes without a second call.
    """
    if torch.compiler.is_compiling():
        return None
    return int(torch.randint(2**62, (1,), device="cpu"))


class Passes:
    """What a module remembers of the passes since the latest optimizer step.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._memory: dict[int, Any] = {}
        self._warned = False

    def recall(self, number: int | None, make: Callable[[], T]) -> T:
        """What `make` gives in this pass; a recomputed pass gets what the first one made."""
        if number is None:
            return make()
        if number not in self._memory:
            self._memory[number] = make()
            if len(self._memory) > MOST_PASSES:
                del self._memory[next(iter(self._memory))]
                self._warn()
        return self._memory[number]

    def learns(self, number: int | None) -> bool:
        """Whether a pass counts: it has a gradient, and is not the recomputation of one that had.

        A pass without gradient is acting or evaluation, or the first of the two passes of a
        reentrant checkpoint, of which the second counts.
        """
        if not torch.is_grad_enabled():
            return False
        if number is None:
            return True
        first = number not in self._memory
        self.recall(number, bool)
        return first

    def clear(self) -> None:
        """An optimizer step is done."""
        self._memory.clear()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{MOST_PASSES} training passes of an MoE layer without an optimizer step: biases, "
                "prototypes and sparsity move once per step only. Call "
                "dynmoe.moe.register_step_hook(model, optimizer) once, or "
                "dynmoe.moe.finish_step(model) after each step",
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


class StepNotes(nn.Module):
    """Base of modules that add up what the training passes of an optimizer step show.

    The sums are plain tensors: with buffers, `DistributedDataParallel` would give every process
    those of rank 0 before each pass whose gradients it averages. They are copied, pickled and moved
    with the module, and are not saved in its `state_dict`.

    Attributes:
        step_notes: names of the attributes that hold them.
    """

    step_notes: ClassVar[tuple[str, ...]] = ()

    def notes(self) -> list[Tensor]:
        """The sums as they are now, each of any shape, in the order of `step_notes`."""
        return [getattr(self, name) for name in self.step_notes]

    def notes_to(self, device: torch.device) -> None:
        """Take them to the data's device, for wrappers that move parameters and buffers alone."""
        for name, noted in zip(self.step_notes, self.notes(), strict=True):
            if noted.device != device:
                setattr(self, name, noted.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of every module (`to`, `half`, `cuda`, ...), for the sums, too."""
        super()._apply(fn, recurse)
        for name, noted in zip(self.step_notes, self.notes(), strict=True):
            setattr(self, name, fn(noted))
        return self


def several_processes() -> bool:
    """Whether torch.distributed runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


_one_batch = False
_positions = 1


def share_batch(on: bool = True) -> None:
    """Say that the rows which the processes see at a time are one batch, dealt out to them.

    Process r of P has the rows r, r + P, r + 2 P, ... of it, with all their positions. From then on
    all that a training pass takes of the batch as a whole, means in losses and noise, is what one
    process would have with the whole batch, and every process must make the same passes. Without
    this, as under `DistributedDataParallel` in general, each process's rows are a batch of their
    own.
    """
    global _one_batch
    _one_batch = on


def one_batch() -> bool:
    """Whether the rows at hand are a part of a batch, see `share_batch`."""
    return _one_batch and several_processes()


@contextmanager
def positions(count: int) -> Iterator[None]:
    """Say that so many rows in turn are the positions of one sample, inside the block.

    Samples are what processes share; all positions of a sample are with one of them.
    """
    global _positions
    before, _positions = _positions, count
    try:
        yield
    finally:
        _positions = before


def places(count: int, device: torch.device) -> Tensor:
    """[count] the places of a pass's rows in the batch, which processes may share."""
    own = torch.arange(count, device=device)
    if not one_batch():
        return own
    samples = own // _positions * dist.get_world_size() + dist.get_rank()
    return samples * _positions + own % _positions


class _Sum(torch.autograd.Function):
    """The sum over processes of a tensor, with the sum of the gradients that come back for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def batch_sum(own: Tensor) -> Tensor:
    """A sum over a pass's rows, of any shape, as one over the whole batch, where that is shared.

    Gradients are right if those of all processes are then averaged, as each has the whole sum.
    """
    if not one_batch():
        return own
    total: Tensor = _Sum.apply(own)
    return total


def batch_mean(own: Tensor) -> Tensor:
    """A mean over a pass's rows, without gradient, as one over the whole batch.

    Where it is shared, all processes must have as many rows of it.
    """
    return sum_over_processes(own) / dist.get_world_size() if one_batch() else own


def sum_over_processes(counts: Tensor) -> Tensor:
    """Counts [M] without gradient, added up over all processes, which call it equally often."""
    if not several_processes():
        return counts
    total = counts.clone()
    dist.all_reduce(total)
    return total


def join_processes(rows: Tensor) -> Tensor:
    """Rows [R, ...] without gradient of all P processes, in order of rank: [P * R, ...].

    All call it equally often, with equal shapes.
    """
    if not several_processes():
        return rows
    all_rows = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(all_rows, rows.contiguous())
    return torch.cat(all_rows)

"""Shorter or longer optimizer steps of some entries of parameters, in any training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Entries = list[tuple[nn.Parameter, int, Tensor]]
"""(parameter, axis, index [n] along it)"""


class Pace:
    """Multiplies each step that chosen entries take, by hooks on an optimizer.

    The step and not the gradient, whose scale Adam ignores.

    Args:
        optimizer: its hooks stay for good.
        factor: of the step; 0 leaves the entries as they are.
        entries: which, asked before each step. One that is named twice, as the rows of a router
            that layers share, counts once.
    """

    def __init__(self, optimizer: Optimizer, factor: float, entries: Callable[[], Entries]) -> None:
        self.factor, self.entries = factor, entries
        self._before: list[tuple[nn.Parameter, int, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(lambda *_: self._step_comes())
        optimizer.register_step_post_hook(lambda *_: self._step_done())

    @torch.no_grad()
    def _step_comes(self) -> None:
        """Note where the entries stand."""
        self._before = []  # of a step that failed
        once = {(id(entry[0]), entry[1]): entry for entry in self.entries()}
        for parameter, axis, index in once.values():
            value = parameter.index_select(axis, index)
            self._before.append((parameter, axis, index, value))

    @torch.no_grad()
    def _step_done(self) -> None:
        """Shorten or lengthen the step that they took."""
        for parameter, axis, index, before in self._before:
            moved = parameter.index_select(axis, index) - before
            parameter.index_copy_(axis, index, before + self.factor * moved)
        self._before = []

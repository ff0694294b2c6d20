"""Auxiliary losses of one forward pass, and their gradient under reentrant checkpoints.

A reentrant checkpoint runs the first pass without gradients, so the losses that are collected then
are bare numbers. They are handed out with a way to hear what gradient comes back for them; the
second pass, in the backward pass, sends that gradient into the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PassLosses:
    """What one pass of a layer adds to the objective.

    Args:
        losses: weighted losses by name, scalars.
    """

    def __init__(self, losses: dict[str, Tensor]) -> None:
        self._losses = losses
        self._with_gradient = torch.is_grad_enabled()
        self._returned: dict[str, Tensor] = {}

    def values(self) -> dict[str, Tensor]:
        """The losses by name, for the objective; hands them out."""
        losses, self._losses = self._losses, {}
        if self._with_gradient or not torch.is_grad_enabled():
            return losses
        anchor = torch.zeros((), requires_grad=True)
        return {
            name: _Listening.apply(value, anchor, name, self._returned)
            for name, value in losses.items()
        }

    def go_on_from(self, y: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """y, the output of a recomputed pass, so that the returned gradient reaches its losses."""
        for name, gradient in self._returned.items():
            y = _Sending.apply(y, losses[name], gradient)
        return y


class _Listening(torch.autograd.Function):
    """A number whose gradient is noted."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, anchor: Tensor, name: str, returned: dict[str, Tensor]
    ) -> Tensor:
        ctx.name, ctx.returned = name, returned
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        before = ctx.returned.get(ctx.name)
        ctx.returned[ctx.name] = gradient if before is None else before + gradient
        return None, None, None, None


class _Sending(torch.autograd.Function):
    """An output whose backward pass also sends a given gradient to a loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.gradient, None

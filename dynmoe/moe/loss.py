"""The contract of auxiliary losses: what keeps routers balanced and experts different."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.moe.bank import ExpertBank
from dynmoe.moe.passes import StepNotes
from dynmoe.moe.router import Router, Routing, check_option
from dynmoe.registry import Part, PartConfig


@dataclass
class LossInput:
    """What an auxiliary loss may read: one forward pass of one layer."""

    x: Tensor
    """what the experts saw, [N, D] (banks of whole samples: [N, ...])"""
    routing: Routing
    """where they went, N rows"""
    router: Router
    bank: ExpertBank


class AuxLoss(StepNotes, Part, kind="loss"):
    """Base of all auxiliary losses. A layer owns one module per loss; buffers hold its state.

    Attributes:
        weight: the factor with which the layer adds the loss.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options that every loss has."""

        weight: float = 0.01
        """factor of the loss in the training objective"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__()
        check_option(config, "weight", config.weight >= 0, "at least 0")
        self.weight = config.weight

    def reset_parameters(self) -> None:
        """Back to the start; losses without buffers have nothing to reset."""

    def finish_step(self, router: Router) -> None:
        """Move what the training passes since the last optimizer step ask for; here nothing.

        Losses with such state note it in `forward`, once per pass (`Passes.learns`), in tensors
        named in `step_notes`, and sum it over all processes here.
        """

    @abstractmethod
    def forward(self, inputs: LossInput) -> Tensor:
        """The loss, not yet weighted; a scalar. Differentiable in the router, the bank or both."""


class PassLosses:
    """What one pass of a layer adds to the objective: weighted losses by name, scalars.

    A reentrant checkpoint runs the first pass without gradients, so that losses which are collected
    then are bare numbers. They are handed out with a way to hear what gradient comes back for them;
    the second pass, in the backward pass, sends that gradient into the layer.
    """

    def __init__(self, losses: dict[str, Tensor]) -> None:
        self._losses = losses
        self._with_gradient = torch.is_grad_enabled()
        self._returned: dict[str, Tensor] = {}

    def values(self) -> dict[str, Tensor]:
        """The losses by name, scalars, for the objective; hands them out."""
        losses, self._losses = self._losses, {}
        if self._with_gradient or not torch.is_grad_enabled():
            return losses
        anchor = torch.zeros((), requires_grad=True)
        return {
            name: _Listening.apply(value, anchor, name, self._returned)
            for name, value in losses.items()
        }

    def go_on_from(self, y: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """y, the output of a recomputed pass, so that the returned gradient reaches its losses.

        y has any shape, and keeps it; the losses are scalars.
        """
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

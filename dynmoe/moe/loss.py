"""The contract of auxiliary losses: what keeps routers balanced and experts different."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank
from dynmoe.moe.router import Router
from dynmoe.moe.routing import Routing
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


class AuxLoss(nn.Module, Part, kind="loss"):
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
        if config.weight < 0:
            raise UserError(f"{self.name} loss: weight={config.weight} must be at least 0")
        self.weight = config.weight

    def reset_parameters(self) -> None:
        """Back to the start; losses without buffers have nothing to reset."""

    def finish_step(self, router: Router) -> None:
        """Move what the training passes since the last optimizer step ask for; here nothing.

        Losses with such state note it in `forward`, once per pass (`Passes.learns`), and sum it
        over all processes here.
        """

    @abstractmethod
    def forward(self, inputs: LossInput) -> Tensor:
        """The loss, not yet weighted; a scalar. Differentiable in the router, the bank or both."""

"""No auxiliary loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynmoe.moe.loss import AuxLoss, LossInput


class NoLoss(AuxLoss, name="none", source="ours"):
    """No loss: the router and the experts follow the task alone, as in DynamicMoE."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of no loss."""

        weight: float = 0.0
        """has no effect"""

    def forward(self, given: LossInput) -> Tensor:
        """0."""
        return given.routing.gates.new_zeros(())

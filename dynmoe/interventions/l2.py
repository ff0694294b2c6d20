"""Regularisation towards zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.moe.layer import moe_layers
from dynmoe.registry import PartConfig


class L2(Intervention, name="l2", source="Krogh & Hertz 1991, Eq. 1"):
    """Penalises the squared norm of all parameters.

    `strength * ||theta||^2`, summed over all parameters, biases too; rows reserved for experts to
    come do not count. Unlike weight decay it goes through the optimizer's moments.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of L2."""

        strength: float = 1e-4
        """factor of the squared norm (our choice; Dohare et al. 2024 search 1e-3 to 1e-6)"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.strength >= 0:
            raise UserError(f"l2: strength={config.strength} must be at least 0")

    def penalty(self) -> Tensor:
        """The penalty at the present weights."""
        alive: dict[Tensor, Tensor] = {}
        for _, layer in moe_layers(self.model):
            for rows in (*layer.router.expert_rows(), *layer.bank.expert_rows()):
                alive[rows] = layer.router.alive.view(-1, *[1] * (rows.dim() - 1))
        squares = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                square = parameter.square()
                if parameter in alive:
                    square = torch.where(alive[parameter], square, 0.0)
                squares.append(square.sum())
        return self.config.strength * torch.stack(squares).sum()

"""Regularisation towards orthogonal rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.weights import weight_matrices
from dynmoe.registry import PartConfig


class Parseval(
    Intervention, name="parseval", source="Chung et al. 2024 (arXiv 2412.07224), Section 3"
):
    """Penalises hidden layers whose weight rows are not orthogonal and of one length.

    `strength * sum_l ||W_l W_l^T - scale * I||_F^2` over all layers but the output layers.
    Convolutions count as [out, in * height * width]; an MoE layer's pool as one matrix in and one
    out. Where W has more rows than columns the penalty cannot reach 0; its gradient is that of the
    columns' penalty.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Parseval regularisation."""

        strength: float = 1e-3
        """factor of the penalty"""
        scale: float = 1.0
        """squared length that rows should have"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.strength >= 0:
            raise UserError(f"parseval: strength={config.strength} must be at least 0")
        if not config.scale > 0:
            raise UserError(f"parseval: scale={config.scale} must be above 0")

    def penalty(self) -> Tensor | float:
        """The penalty at the present weights."""
        terms = []
        for slot in weight_matrices(self.model, outputs=False):
            weight = slot.parameter.flatten(1)
            target = self.config.scale * torch.eye(len(weight)).to(weight)
            terms.append((weight @ weight.T - target).square().sum())
        return self.config.strength * torch.stack(terms).sum() if terms else 0.0

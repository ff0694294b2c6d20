"""Balancing through the router's weights: orthonormal rows keep similar samples together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.moe.loss import AuxLoss, LossInput


class SimilarityLoss(AuxLoss, name="similarity", source="Omi et al. 2025 (arXiv 2506.14038)"):
    """Sum of |R R^T - I| over the living experts' router rows R [E, D].

    Orthonormal rows keep the similarity of samples in their logits. The sum of the E^2 entries is
    not divided by anything. The loss knows weights only, no samples: it cannot see an imbalance
    that the data bring about. With one living expert it is `| |r|^2 - 1 |`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of similarity-preserving balancing."""

        weight: float = 0.1
        """factor of the loss in the training objective"""

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the router's weights; samples have no part in it."""
        rows = torch.where(given.routing.alive.unsqueeze(1), given.router.weight, 0.0)
        return (rows @ rows.T - torch.diag(given.routing.alive).to(rows.dtype)).abs().sum()

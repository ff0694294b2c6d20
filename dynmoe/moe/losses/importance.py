"""Balancing by importance: every expert's gates add up to the same."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.moe.loss import AuxLoss, LossInput


class ImportanceLoss(
    AuxLoss, name="importance", source="Shazeer et al. 2017 (arXiv 1701.06538), Eqs. 6-7"
):
    """Squared coefficient of variation of the experts' summed gates; 0 at perfect balance.

    At collapse on one of E experts it is E; with one living expert 0.
    """

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch."""
        return cv_squared(given.routing.mean(given.routing.gates), given.routing.alive)


def cv_squared(values: Tensor, alive: Tensor) -> Tensor:
    """Squared coefficient of variation of values [M] over the living experts: a scalar.

    The variance is the unbiased one and 1e-10 is added to the squared mean: our choice, the paper
    leaves both open. One expert gives 0.
    """
    values, count = torch.where(alive, values, 0.0), alive.sum()
    mean = values.sum() / count
    squares = torch.where(alive, values - mean, 0.0).square()
    return squares.sum() / (count - 1).clamp(min=1) / (mean.square() + 1e-10)

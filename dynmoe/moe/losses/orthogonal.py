"""Experts with different weights: overlap of what they respond to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.moe.bank import UnitBank
from dynmoe.moe.comparing import living_pairs, unit_inputs
from dynmoe.moe.loss import AuxLoss, LossInput


class OrthogonalLoss(
    AuxLoss, name="orthogonal", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 7"
):
    """Sum over ordered pairs of experts of their weights' squared cosine; 0 for orthogonal experts.

    Banks of rows: the cosine of the experts' flattened rows, Eq. 7 itself. Hidden units have no
    order and experts may differ in size, so for pools of units (our choice) W_i holds the incoming
    weights of expert i's units, a row per unit, and a pair counts
    `||W_i W_j^T||_F^2 / (||W_i||_F^2 ||W_j||_F^2)`: Eq. 7 for one unit each, never above 1, the
    same in every order of the units. 0 with one living expert.
    """

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the bank's weights; samples have no part in it."""
        alive = given.routing.alive
        if isinstance(given.bank, UnitBank):
            overlaps = unit_overlaps(given.bank, len(alive))
        else:
            rows = torch.cat([p.flatten(1) for p in given.bank.expert_rows()], dim=1)
            overlaps = row_overlaps(torch.where(alive.unsqueeze(1), rows, 0.0))
        return torch.where(living_pairs(alive), overlaps, 0.0).sum()


def row_overlaps(rows: Tensor) -> Tensor:
    """Squared cosines [M, M] of rows [M, F]; 0 where a row is 0."""
    rows = rows / _norm(rows.square().sum(dim=1, keepdim=True))
    return (rows @ rows.T).square()


def unit_overlaps(bank: UnitBank, experts: int) -> Tensor:
    """Overlaps [M, M] of the experts' incoming weights, as `OrthogonalLoss` defines them."""
    weights = torch.cat(unit_inputs(bank), dim=1)  # [H, F]
    owner = F.one_hot(bank.segment, experts).to(weights.dtype)  # [H, M]
    norms = _norm(owner.T @ weights.square().sum(dim=1))
    rows = weights / norms[bank.segment].unsqueeze(1)
    return owner.T @ (rows @ rows.T).square() @ owner


def _norm(squares: Tensor) -> Tensor:
    """Square roots, with a finite gradient at 0."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

"""Experts with different outputs: Gram-Schmidt along the experts, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.moe.comparing import living_outputs
from dynmoe.moe.loss import AuxLoss, LossInput


class GramSchmidtLoss(
    AuxLoss, name="gram-schmidt", source="ours, after Liu et al. 2023 (arXiv 2310.09762)"
):
    """How much of each expert's output lies in the span of the experts before it, 0 to 1.

    Mean over samples and over experts but the first of `|P y|^2 / |y|^2`, P the projection on the
    span: 0 where the outputs are orthogonal, 1 where every expert repeats its predecessors. The
    papers (also Hendawy et al. 2024, arXiv 2311.11385) force orthogonality by construction; the
    loss is our choice. From three experts on it depends on their order, and with more experts than
    outputs it cannot reach 0. 0 with one living expert. Needs every expert's output for every
    sample, also where the router is sparse.
    """

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch."""
        outputs, alive = living_outputs(given)
        cosines = torch.einsum("ind,jnd->nij", _unit(outputs), gram_schmidt(outputs, alive))
        inside = cosines.square().tril(diagonal=-1).sum(dim=(1, 2))
        return given.routing.mean(inside) / (alive.sum() - 1).clamp(min=1)


def gram_schmidt(outputs: Tensor, alive: Tensor) -> Tensor:
    """Outputs [M, N, D] made orthonormal along the experts, for each sample: [M, N, D].

    An expert whose output lies in the span of its predecessors (all but the square root of the
    machine precision of it), is 0 or is not alive [M] gets 0. Each step runs twice, which keeps the
    result orthogonal in float32 also for nearly dependent outputs.
    """
    precision = torch.finfo(outputs.dtype).eps
    outputs = _unit(torch.where(alive.view(-1, 1, 1), outputs, 0.0))
    basis = torch.zeros_like(outputs[:0])
    for output in outputs:
        for _ in range(2):
            along = torch.einsum("nd,mnd->mn", output, basis)
            output = output - torch.einsum("mn,mnd->nd", along, basis)
        square = output.square().sum(dim=1, keepdim=True)
        output = torch.where(square > precision, output / square.clamp_min(precision).sqrt(), 0.0)
        basis = torch.cat([basis, output.unsqueeze(0)])
    return basis


def _unit(x: Tensor) -> Tensor:
    """Vectors along the last axis divided by their length; 0 stays 0, with a finite gradient."""
    square = x.square().sum(dim=-1, keepdim=True)
    return x / square.clamp_min(torch.finfo(x.dtype).tiny).sqrt()

"""Experts that teach each other: their outputs come closer as distributions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.comparing import living_outputs, mean_over_pairs
from dynmoe.moe.loss import AuxLoss, LossInput


class DistillationLoss(
    AuxLoss, name="distillation", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 8"
):
    """`KL(E_i(x) || E_j(x))`, mean over ordered pairs of living experts and over samples, nats.

    E_i(x) is the softmax of expert i's output features over a temperature, with no factor
    temperature^2. Eq. 8 sums over the pairs; the mean (our choice) does not grow with the experts.
    0 with one living expert. Needs every expert's output for every sample, also where the router is
    sparse.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of mutual distillation."""

        temperature: float = 1.0
        """divides the outputs; larger is softer"""
        detach_target: bool = False
        """no gradient through E_i, the teacher of a pair; else both experts move"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        if config.temperature <= 0:
            raise UserError(f"distillation loss: temperature={config.temperature} must be above 0")
        self.temperature, self.detach_target = config.temperature, config.detach_target

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch."""
        outputs, alive = living_outputs(given)
        log_p = (outputs / self.temperature).log_softmax(dim=2)
        teacher = log_p.detach() if self.detach_target else log_p
        p = teacher.exp()
        own = (p * teacher).sum(dim=2).T  # [N, M]
        divergence = own.unsqueeze(2) - torch.einsum("inf,jnf->nij", p, log_p)
        return given.routing.mean(mean_over_pairs(divergence, alive))

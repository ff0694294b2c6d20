"""Balancing by information: the expert tells the sample, and every expert is used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.loss import AuxLoss, LossInput


class MutualInformationLoss(
    AuxLoss,
    name="mutual-information",
    source="ours; its entropies as in Mustafa et al. 2022 (arXiv 2206.02770)",
):
    """Minus the mutual information of expert and sample, `mean H(P) - H(mean P)`, nats.

    -log E where every sample is sure of its expert and all are used alike, 0 at collapse and where
    all samples are undecided. With weights (0, 1) it is LIMoE's local entropy loss, with (1, 0) its
    global one without a threshold. 0 with one living expert.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of the information loss."""

        marginal: float = 1.0
        """factor of the entropy of the mean probabilities, which is raised: balance"""
        conditional: float = 1.0
        """factor of the samples' mean entropy, which is lowered: sharpness"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        for name in ("marginal", "conditional"):
            if getattr(config, name) < 0:
                raise UserError(
                    f"mutual-information loss: {name}={getattr(config, name)} must be at least 0"
                )
        self.marginal, self.conditional = config.marginal, config.conditional

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch."""
        routing, p = given.routing, given.routing.probabilities
        used = entropy(routing.mean(p))
        return self.conditional * routing.mean(entropy(p)) - self.marginal * used


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy over the last axis, nats; its gradient is finite where p is 0."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)

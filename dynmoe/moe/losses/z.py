"""The router z-loss, which keeps logits small."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynmoe.moe.loss import AuxLoss, LossInput


class ZLoss(AuxLoss, name="z", source="Zoph et al. 2022 (arXiv 2202.08906), Eq. 5"):
    """Mean over samples of `(log sum_e exp(logit_e))^2`, living experts only.

    With one living expert it is the mean squared logit. Large logits are where softmax rounds
    badly; the loss does not balance.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of the router z-loss."""

        weight: float = 0.001
        """factor of the loss in the training objective"""

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch."""
        return given.routing.mean(given.routing.logits.logsumexp(dim=1).square())

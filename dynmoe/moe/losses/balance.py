"""Losses that balance the use of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.loss import AuxLoss, LossInput


class NoLoss(AuxLoss, name="none", source="ours"):
    """No loss: the router and the experts follow the task alone, as in DynamicMoE."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of no loss."""

        weight: float = 0.0
        """has no effect"""

    def forward(self, inputs: LossInput) -> Tensor:
        """0."""
        return inputs.routing.gates.new_zeros(())


class ImportanceLoss(
    AuxLoss, name="importance", source="Shazeer et al. 2017 (arXiv 1701.06538), Eqs. 6-7"
):
    """Squared coefficient of variation of the experts' summed gates; 0 at perfect balance.

    At collapse on one of E experts it is E; with one active expert 0.
    """

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        return cv_squared(inputs.routing.mean(inputs.routing.gates), inputs.routing.active)


def cv_squared(values: Tensor, active: Tensor) -> Tensor:
    """Squared coefficient of variation of values [M] over the active experts: a scalar.

    The variance is the unbiased one and 1e-10 is added to the squared mean: our choice, the paper
    leaves both open. One expert gives 0.
    """
    values, count = torch.where(active, values, 0.0), active.sum()
    mean = values.sum() / count
    squares = torch.where(active, values - mean, 0.0).square()
    return squares.sum() / (count - 1).clamp(min=1) / (mean.square() + 1e-10)


class LoadLoss(
    AuxLoss, name="load", source="Shazeer et al. 2017 (arXiv 1701.06538), Appendix A, Eq. 11"
):
    """Squared coefficient of variation of the experts' smooth load, for noisy routers.

    The smooth load of an expert is the sum over samples of the chance that fresh noise makes the
    router pick it (`Routing.load`). 0 with one active expert; variance as in `importance`.
    """

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch.

        Raises:
            UserError: the router gives no smooth load.
        """
        load = inputs.routing.load
        if load is None:
            raise UserError(
                f"load loss: router {inputs.router.name!r} gives no smooth load; take a noisy one "
                "such as 'noisy-topk', or the loss 'importance'"
            )
        return cv_squared(inputs.routing.mean(load), inputs.routing.active)


class SwitchLoss(AuxLoss, name="switch", source="Fedus et al. 2021 (arXiv 2101.03961), Eqs. 4-6"):
    """Load balancing by f.P: `E * sum_e f_e P_e`; 1 at perfect balance, E at collapse.

    f_e is the share of picks that go to expert e (the chosen experts, or the largest logit's for
    dense routing) and has no gradient; P_e is e's mean probability. Also Eq. 5 of Zhang et al. 2025
    (arXiv 2507.11181), which leaves the factor E to alpha.
    """

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        routing = inputs.routing
        picks = routing.mean(routing.picks())
        share = picks / picks.sum().clamp_min(1e-12)
        return routing.active.sum() * (share * routing.mean(routing.probabilities)).sum()


class ZLoss(AuxLoss, name="z", source="Zoph et al. 2022 (arXiv 2202.08906), Eq. 5"):
    """Mean over samples of `(log sum_e exp(logit_e))^2`, active experts only.

    With one active expert it is the mean squared logit. Large logits are where softmax rounds
    badly; the loss does not balance.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of the router z-loss."""

        weight: float = 0.001
        """factor of the loss in the training objective"""

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        return inputs.routing.mean(inputs.routing.logits.logsumexp(dim=1).square())


class SimilarityLoss(AuxLoss, name="similarity", source="Omi et al. 2025 (arXiv 2506.14038)"):
    """Sum of |R R^T - I| over the active experts' router rows R [E, D].

    Orthonormal rows keep the similarity of samples in their logits. The sum of the E^2 entries is
    not divided by anything. The loss knows weights only, no samples: it cannot see an imbalance
    that the data bring about. With one active expert it is `| |r|^2 - 1 |`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of similarity-preserving balancing."""

        weight: float = 0.1
        """factor of the loss in the training objective"""

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the router's weights; samples have no part in it."""
        rows = torch.where(inputs.routing.active.unsqueeze(1), inputs.router.weight, 0.0)
        return (rows @ rows.T - torch.diag(inputs.routing.active).to(rows.dtype)).abs().sum()


class MutualInformationLoss(
    AuxLoss,
    name="mutual-information",
    source="ours; its entropies as in Mustafa et al. 2022 (arXiv 2206.02770)",
):
    """Minus the mutual information of expert and sample, `mean H(P) - H(mean P)`, nats.

    -log E where every sample is sure of its expert and all are used alike, 0 at collapse and where
    all samples are undecided. With weights (0, 1) it is LIMoE's local entropy loss, with (1, 0) its
    global one without a threshold. 0 with one active expert.
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

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        routing, p = inputs.routing, inputs.routing.probabilities
        used = entropy(routing.mean(p))
        return self.conditional * routing.mean(entropy(p)) - self.marginal * used


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy over the last axis, nats; its gradient is finite where p is 0."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)

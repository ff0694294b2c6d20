"""Losses that balance the use of experts, by the batch or by counts over an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.loss import AuxLoss, LossInput
from dynmoe.moe.passes import Passes, new_pass, sum_over_processes
from dynmoe.moe.router import Router, Routing, check_option


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

    An expert's smooth load is the sum over samples of the chance that fresh noise makes the router
    pick it (`Routing.load`). 0 with one active expert; variance as in `importance`.
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
            check_option(config, name, getattr(config, name) >= 0, "at least 0")
        self.marginal, self.conditional = config.marginal, config.conditional

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        routing, p = inputs.routing, inputs.routing.probabilities
        used = entropy(routing.mean(p))
        return self.conditional * routing.mean(entropy(p)) - self.marginal * used


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy of p [..., K] over its last axis, nats: [...].

    Its gradient is finite where p is 0.
    """
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


class CountingLoss(AuxLoss):
    """Base of the losses that count picks over the training passes of an optimizer step.

    Attributes:
        counts: [M] int64, picks of each expert since the last optimizer step; not saved.
    """

    step_notes = ("counts",)

    def __init__(self, config: AuxLoss.Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        self.counts = torch.zeros(max_experts, dtype=torch.long)
        self._passes, self._seen = Passes(), Passes()

    def reset_parameters(self) -> None:
        """Forget all passes."""
        self.counts.zero_()
        self._passes.clear()
        self._seen.clear()


class GlobalBalanceLoss(
    CountingLoss, name="global-balance", source="Qiu et al. 2025 (arXiv 2501.11873)"
):
    """`E * sum_e f_e P_e` with f of the global batch: experts may specialise within a micro-batch.

    f_e is the share of picks that went to expert e in this and the preceding training passes of the
    current optimizer step, on all processes where torch.distributed runs; P_e is e's mean
    probability in this pass alone. With one pass per step and one process this is `switch`. 1 with
    one active expert.
    """

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of this pass; notes its picks."""
        routing = inputs.routing
        mean = routing.mean(routing.probabilities)
        number = new_pass()
        self.notes_to(mean.device)
        before, picks = self._seen.recall(number, lambda: self._count(routing))
        if self._passes.learns(number):
            self.counts += picks
        # Half precision holds no large counts.
        share = (before + picks).to(torch.promote_types(mean.dtype, torch.float32))
        share = share / share.sum().clamp(min=1)
        return routing.active.sum() * (share.to(mean.dtype) * mean).sum()

    def finish_step(self, router: Router) -> None:
        """Begin the next global batch."""
        self.reset_parameters()

    @torch.no_grad()
    def _count(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """[M] picks of the passes before, and [M] those of this one."""
        return self.counts.clone(), sum_over_processes(routing.picks().long().sum(dim=0))


class LossFree(
    CountingLoss,
    name="loss-free",
    source="Wang et al. 2024 (arXiv 2408.15664), Section 3, Algorithm 1",
):
    """Bias balancing: after each optimizer step, experts below the mean count get a larger bias.

    `bias_e += rate * sign(mean count - count_e)` on `Router.selection_bias`, which decides who is
    chosen and never enters a gate; the loss itself is 0. Also DeepSeek-V3 (arXiv 2412.19437),
    Section 2.1.2. Counts are added up over the step's passes and over processes. Only routers that
    are `steerable` can be balanced so, such as topk. With one active expert nothing happens.

    Our choice: biases are kept at mean 0 over the active experts. That changes no choice, and lets
    a new expert, whose bias is 0, start level with the others.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of bias balancing."""

        weight: float = 0.0
        """has no effect"""
        rate: float = 0.001
        """step of the biases per optimizer step, in units of the router's scores"""
        update: Literal["sign", "proportional"] = "sign"
        """step by the sign of the missing count, or by the missing count over the mean count (the
        paper's variant takes the plain count; the share does not depend on the batch size)"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        if config.rate <= 0:
            raise UserError(f"loss-free balancing: rate={config.rate} must be above 0")
        if config.update not in ("sign", "proportional"):
            raise UserError(
                f"loss-free balancing: update={config.update!r} must be sign or proportional"
            )
        self.rate, self.update = config.rate, config.update

    def forward(self, inputs: LossInput) -> Tensor:
        """0; in training, notes who was chosen.

        Raises:
            UserError: the router is dense, or chooses by other means than its scores, so that no
                bias can steer it.
        """
        chosen = inputs.routing.chosen
        if chosen is None or not inputs.router.steerable:
            raise UserError(
                f"loss-free balancing: router {inputs.router.name!r} makes no choice that a bias "
                "could steer; take one such as 'topk', or another loss"
            )
        if self.training and self._passes.learns(new_pass()):
            self.notes_to(chosen.device)
            self.counts += chosen.sum(dim=0)
        return inputs.routing.gates.new_zeros(())

    @torch.no_grad()
    def finish_step(self, router: Router) -> None:
        """Move the router's biases by the experts chosen in the step's passes."""
        bias, active = router.selection_bias, router.active
        wide = torch.promote_types(bias.dtype, torch.float32)  # half precision: no large counts
        self.notes_to(bias.device)
        counts = sum_over_processes(self.counts).to(wide)
        experts = active.sum()
        mean = counts.sum() / experts
        missing = mean - counts
        step = missing.sign() if self.update == "sign" else missing / mean.clamp_min(1e-12)
        moved = torch.where(active, bias + self.rate * step, 0.0)
        moved = torch.where(active, moved - moved.sum() / experts, bias)
        bias.copy_(torch.where(counts.sum() > 0, moved, bias))
        self.reset_parameters()

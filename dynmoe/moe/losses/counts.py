"""Balancing by counts over the passes of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.loss import AuxLoss, LossInput
from dynmoe.moe.passes import Passes, new_pass
from dynmoe.moe.processes import sum_over_processes
from dynmoe.moe.router import Router


class GlobalBalanceLoss(
    AuxLoss, name="global-balance", source="Qiu et al. 2025 (arXiv 2501.11873)"
):
    """`E * sum_e f_e P_e` with f of the global batch: experts may specialise within a micro-batch.

    f_e is the share of picks that went to expert e in this and the preceding training passes of the
    current optimizer step, on all processes where torch.distributed runs; P_e is e's mean
    probability in this pass alone. With one pass per step and one process this is `switch`. 1 with
    one active expert.

    Attributes:
        counts: buffer [M] int64, picks of each expert since the last optimizer step; not saved.
    """

    counts: Tensor

    def __init__(self, config: AuxLoss.Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        counts = torch.empty(max_experts, dtype=torch.long)
        self.register_buffer("counts", counts, persistent=False)
        self._seen, self._noted = Passes(), Passes()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all passes."""
        self.counts.zero_()
        self._seen.clear()
        self._noted.clear()

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of this pass; notes its picks."""
        routing = inputs.routing
        mean = routing.mean(routing.probabilities)
        number = new_pass()
        before, picks = self._seen.recall(number, lambda: self._count(routing.picks()))
        if self._noted.learns(number):
            self.counts += picks
        # Half precision holds no large counts.
        share = (before + picks).to(torch.promote_types(mean.dtype, torch.float32))
        share = share / share.sum().clamp(min=1)
        return routing.active.sum() * (share.to(mean.dtype) * mean).sum()

    def finish_step(self, router: Router) -> None:
        """Begin the next global batch."""
        self.reset_parameters()

    @torch.no_grad()
    def _count(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """[M] picks of the passes before, and [M] those of this one from picks [N, M]."""
        return self.counts.clone(), sum_over_processes(picks.long().sum(dim=0))


class LossFree(
    AuxLoss, name="loss-free", source="Wang et al. 2024 (arXiv 2408.15664), Section 3, Algorithm 1"
):
    """Bias balancing: after each optimizer step, experts below the mean count get a larger bias.

    `bias_e += rate * sign(mean count - count_e)` on `Router.selection_bias`, which decides who is
    chosen and never enters a gate; the loss itself is 0. Also DeepSeek-V3 (arXiv 2412.19437),
    Section 2.1.2. Counts are added up over the step's passes and over processes. Only routers that
    are `steerable` can be balanced so, such as topk. With one active expert nothing happens.

    Our choice: biases are kept at mean 0 over the active experts. That changes no choice, and lets
    a new expert, whose bias is 0, start level with the others.

    Attributes:
        counts: buffer [M] int64, picks of each expert since the last optimizer step; not saved.
    """

    counts: Tensor

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
        counts = torch.zeros(max_experts, dtype=torch.long)
        self.register_buffer("counts", counts, persistent=False)
        self._passes = Passes()

    def reset_parameters(self) -> None:
        """Forget all passes; the biases belong to the router."""
        self.counts.zero_()
        self._passes.clear()

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
            self.counts += chosen.sum(dim=0)
        return inputs.routing.gates.new_zeros(())

    @torch.no_grad()
    def finish_step(self, router: Router) -> None:
        """Move the router's biases by the experts chosen in the step's passes."""
        bias, active = router.selection_bias, router.active
        wide = torch.promote_types(bias.dtype, torch.float32)  # half precision: no large counts
        counts = sum_over_processes(self.counts).to(wide)
        experts = active.sum()
        mean = counts.sum() / experts
        missing = mean - counts
        step = missing.sign() if self.update == "sign" else missing / mean.clamp_min(1e-12)
        moved = torch.where(active, bias + self.rate * step, 0.0)
        moved = torch.where(active, moved - moved.sum() / experts, bias)
        bias.copy_(torch.where(counts.sum() > 0, moved, bias))
        self.reset_parameters()

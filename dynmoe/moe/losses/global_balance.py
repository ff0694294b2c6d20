"""The Switch loss with expert counts of the whole global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.loss import AuxLoss, LossInput
from dynmoe.moe.processes import sum_over_processes


class GlobalBalanceLoss(
    AuxLoss, name="global-balance", source="Qiu et al. 2025 (arXiv 2501.11873)"
):
    """`E * sum_e f_e P_e` with f of the global batch: experts may specialise within a micro-batch.

    f_e is the share of picks that went to expert e in this and the preceding forward passes of the
    current group of `micro_batches`, on all processes where torch.distributed runs; P_e is e's mean
    probability in this pass alone. With one pass per group and one process this is `switch`. 1 with
    one living expert.

    Attributes:
        counts: buffer [M] int64, picks of each expert in the current group.
        passes: buffer [1] int64, forward passes so far.
    """

    counts: Tensor
    passes: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of global balancing."""

        micro_batches: int = 1
        """forward passes whose picks are added up, such as those of one optimizer step; with 1,
        processes alone make the batch global"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        if config.micro_batches < 1:
            raise UserError(
                f"global-balance loss: micro_batches={config.micro_batches} must be at least 1"
            )
        self.micro_batches = config.micro_batches
        self.register_buffer("counts", torch.zeros(max_experts, dtype=torch.long))
        self.register_buffer("passes", torch.zeros(1, dtype=torch.long))

    def reset_parameters(self) -> None:
        """Forget all passes."""
        self.counts.zero_()
        self.passes.zero_()

    def forward(self, given: LossInput) -> Tensor:
        """The loss of this pass; notes its picks."""
        routing = given.routing
        mean = routing.mean(routing.probabilities)
        # Half precision holds no large counts.
        share = self._count(routing.picks()).to(torch.promote_types(mean.dtype, torch.float32))
        share = share / share.sum().clamp(min=1)
        return routing.alive.sum() * (share.to(mean.dtype) * mean).sum()

    @torch.no_grad()
    def _count(self, picks: Tensor) -> Tensor:
        """Picks [N, M] added to those of the group: [M]."""
        fresh = sum_over_processes(picks.long().sum(dim=0))
        counts = torch.where(self.passes % self.micro_batches == 0, 0, self.counts) + fresh
        self.counts.copy_(counts)
        self.passes += 1
        return counts

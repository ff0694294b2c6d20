"""The Switch loss with expert counts of the whole global batch."""

from __future__ import annotations

import torch
from torch import Tensor

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
    one living expert.

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

    def forward(self, given: LossInput) -> Tensor:
        """The loss of this pass; notes its picks."""
        routing = given.routing
        mean = routing.mean(routing.probabilities)
        number = new_pass()
        before, picks = self._seen.recall(number, lambda: self._count(routing.picks()))
        if self._noted.learns(number):
            self.counts += picks
        # Half precision holds no large counts.
        share = (before + picks).to(torch.promote_types(mean.dtype, torch.float32))
        share = share / share.sum().clamp(min=1)
        return routing.alive.sum() * (share.to(mean.dtype) * mean).sum()

    def finish_step(self, router: Router) -> None:
        """Begin the next global batch."""
        self.reset_parameters()

    @torch.no_grad()
    def _count(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """[M] picks of the passes before, and [M] those of this one from picks [N, M]."""
        return self.counts.clone(), sum_over_processes(picks.long().sum(dim=0))

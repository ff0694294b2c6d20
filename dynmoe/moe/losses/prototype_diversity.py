"""Different router rows: prototypes repel each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.comparing import mean_over_pairs
from dynmoe.moe.loss import AuxLoss, LossInput

Form = Literal["euclidean", "cosine", "kl"]


class PrototypeDiversity(
    AuxLoss, name="prototype-diversity", source="ours; its euclidean form is Eq. 9 of MoE²"
):
    """Mean similarity of two living experts' router rows v, 1 for equal rows.

    euclidean: `exp(-||v_k - v_j||_2)`, Eq. 9. cosine: `max(0, cos(v_k, v_j))`; without the bound
    two heaps of equal rows that point apart would count as diverse. kl: `exp(-J)`, J the mean of
    both KL divergences between softmax(v_k) and softmax(v_j), nats. The latter two are our choice.
    0 with one living expert. Where rows are exactly equal, euclidean and kl have no gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of prototype diversity."""

        form: Form = "euclidean"
        """how similarity is measured"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        if config.form not in get_args(Form):
            raise UserError(
                f"prototype-diversity loss: form={config.form!r} must be one of "
                f"{', '.join(get_args(Form))}"
            )
        self.form = config.form

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the router's weights; samples have no part in it."""
        alive = given.routing.alive
        rows = torch.where(alive.unsqueeze(1), given.router.weight, 0.0)
        return mean_over_pairs(self._similarity(rows), alive)

    def _similarity(self, rows: Tensor) -> Tensor:
        """Similarity [M, M] of rows [M, D]."""
        if self.form == "cosine":
            rows = F.normalize(rows, dim=1)
            return (rows @ rows.T).clamp_min(0.0)
        if self.form == "kl":
            log_p = rows.log_softmax(dim=1)
            p = log_p.exp()
            cross = p @ log_p.T
            divergence = cross.diagonal().unsqueeze(1) - cross
            return torch.exp(-0.5 * (divergence + divergence.T))
        return torch.exp(-torch.linalg.vector_norm(rows.unsqueeze(1) - rows, dim=2))

"""SPHERE: what the router lets through of the experts' hidden units is kept of full rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.experts.networks import NetworkBank
from dynmoe.moe.loss import AuxLoss, LossInput


class SphereLoss(AuxLoss, name="sphere", source="Luo et al. 2026 (arXiv 2605.04712), SPHERE"):
    """Spread of the eigenvalues of the experts' router-weighted features; 0 if all are alike.

    `A = Phi^T Phi / N` [m, m] is the Gram matrix of the features; row n of Phi [N, m] joins the
    hidden units of every expert, each times the expert's gate for sample n. With c = tr(A) / m, the
    mean of A's eigenvalues, the loss is
        relative: `||A / c - I||_F^2 / m`, the eigenvalues' squared coefficient of variation, 0..m-1
        paper:    `||A - c I||_F^2`

    The paper's (known to us from its abstract and summaries of it): the second form; one penalty
    for all experts together, so that two experts with the same features count as a loss; on the
    last hidden layer of the experts only.

    Our choices: the first form. The second goes with the fourth power of features and gates, by
    orders of magnitude within a run and with each growth, so that no fixed weight serves it (the
    authors' published scripts set its gradient to a share of the task's). The weight. Every
    position of an image or sequence is a sample. Each MoE layer has a term of its own, so that
    `--network.place all` gives as many as blocks. The loss needs every hidden unit for every
    sample, also where the router is sparse, and m^2 numbers; with N < m it cannot reach 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of SPHERE."""

        weight: float = 0.001
        """factor of the loss in the training objective"""
        form: Literal["relative", "paper"] = "relative"
        """relative: whatever the scale of the features; paper: as it stands there"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        if config.form not in ("relative", "paper"):
            raise UserError(f"sphere loss: form={config.form!r} must be relative or paper")
        self.form = config.form

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch.

        Raises:
            UserError: the bank's experts have no hidden layer.
        """
        features, living = router_weighted_features(inputs)
        mask = inputs.routing.mask
        samples = max(len(features), 1) if mask is None else mask.sum().clamp(min=1)
        positions = max(features.shape[2], 1)
        gram = torch.einsum("nmp,nkp->mk", features, features) / (samples * positions)
        mean = gram.trace() / living.sum()
        gaps = gram - torch.diag(mean * living)
        if self.form == "paper":
            return gaps.square().sum()
        mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)  # features may all be 0
        return (gaps / mean).square().sum() / living.sum()


def router_weighted_features(inputs: LossInput) -> tuple[Tensor, Tensor]:
    """Features [N, m, P] at each sample's P positions, and which of them [m] active experts own.

    Features of reserved experts and of padding are 0.

    Raises:
        UserError: the bank's experts have no hidden layer.
    """
    bank, gates = inputs.bank, inputs.routing.gates
    if isinstance(bank, UnitBank):
        hidden = bank.hidden(inputs.x)
        weights = gates[:, bank.segment]
        living = torch.ones_like(bank.segment, dtype=torch.bool)
    elif isinstance(bank, NetworkBank):
        hidden = bank.last_hidden(inputs.x)  # [M, N, F]
        hidden = torch.where(inputs.routing.active.view(-1, 1, 1), hidden, 0.0)
        width = hidden.shape[2]
        hidden = hidden.movedim(0, 1).flatten(1)
        weights = gates.repeat_interleave(width, dim=1)
        living = inputs.routing.active.repeat_interleave(width)
    else:
        raise UserError(f"sphere loss: experts of bank {bank.name!r} have no hidden layer")
    hidden = hidden.flatten(2) if hidden.dim() > 2 else hidden.unsqueeze(2)
    return hidden * weights.unsqueeze(2), living

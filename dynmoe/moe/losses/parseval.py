"""Parseval regularisation of each expert's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank, UnitBank
from dynmoe.moe.comparing import unit_inputs
from dynmoe.moe.loss import AuxLoss, LossInput


class ParsevalLoss(
    AuxLoss, name="parseval", source="Chung et al. 2024 (arXiv 2412.07224), Section 3"
):
    """Mean over living experts of `||W_e W_e^T - s I||_F^2`, which keeps learning well-conditioned.

    W_e [H_e, D_in] are the weights into expert e's hidden units, one term for each such matrix; for
    banks without units every weight matrix of the expert but its output layer's. An expert with
    more rows than columns cannot reach 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of Parseval regularisation."""

        weight: float = 0.001
        """factor of the loss in the training objective"""
        scale: float = 1.0
        """s: squared length that rows are pulled to"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        if config.scale <= 0:
            raise UserError(f"parseval loss: scale={config.scale} must be above 0")
        self.scale = config.scale

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the bank's weights; samples have no part in it.

        Raises:
            UserError: the bank has no weight matrices.
        """
        bank, alive = given.bank, given.routing.alive
        terms = self._units(bank) if isinstance(bank, UnitBank) else self._rows(bank, alive)
        if not terms:
            raise UserError(
                f"parseval loss: bank {bank.name!r} has no weight matrices to keep even"
            )
        return torch.stack(terms).sum() / alive.sum()

    def _units(self, bank: UnitBank) -> list[Tensor]:
        """One sum over all experts for each matrix of a pool of units."""
        same = bank.segment.unsqueeze(1) == bank.segment  # units of one expert
        terms = []
        for weights in unit_inputs(bank):
            products = torch.where(same, weights @ weights.T, 0.0)
            terms.append((products - self._target(products)).square().sum())
        return terms

    def _rows(self, bank: ExpertBank, alive: Tensor) -> list[Tensor]:
        """One sum over all experts for each stack of matrices [M, rows, columns]."""
        terms, last = [], {id(p) for p in bank.output_rows()}
        for stack in bank.expert_rows():
            if stack.dim() < 3 or id(stack) in last:
                continue
            weights = torch.where(alive.view(-1, 1, 1), stack.flatten(2), 0.0)
            gaps = weights @ weights.mT
            gaps = torch.where(alive.view(-1, 1, 1), gaps - self._target(gaps), 0.0)
            terms.append(gaps.square().sum())
        return terms

    def _target(self, products: Tensor) -> Tensor:
        """s I of the last two axes of `products`."""
        return self.scale * torch.eye(
            products.shape[-1], dtype=products.dtype, device=products.device
        )

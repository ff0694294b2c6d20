"""Routing turned round: each expert takes its best tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class ExpertChoiceRouter(
    Router,
    name="expert-choice",
    source="Zhou et al. 2022 (arXiv 2202.09368), Section 3.2; "
    "Zhang et al. 2025 (arXiv 2507.11181), Eq. 14",
):
    """Each expert takes its `ceil(T c / E)` most probable tokens; loads are equal by construction.

    Zhou et al. 2022 (arXiv 2202.09368), Section 3.2; the survey of Zhang et al. 2025
    (arXiv 2507.11181), Eq. 14. T counts the real tokens of a sequence; for x [N, D] the batch is
    one sequence. A token may be taken by several experts or by none; its gates are the
    probabilities (softmax over experts) of those that took it. Tokens compete, so a token's routing
    depends on the others of its sequence, later ones too. Of equal scores the earlier token wins.
    A selection bias per expert changes nothing here.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the expert-choice router."""

        capacity: float = 2.0
        """experts that take a token, on average (the paper's c)"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if config.capacity <= 0:
            raise UserError(f"expert-choice router: capacity={config.capacity} must be above 0")
        super().__init__(dim, num_experts, max_experts, generator)
        self.capacity = config.capacity

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] in `inputs.groups` sequences of equal length."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        probabilities = logits.softmax(dim=1)
        real = inputs.mask
        if real is None:
            real = torch.ones_like(logits[:, 0], dtype=torch.bool)
        # The logarithm keeps apart what underflows to probability 0.
        scores = logits.detach().log_softmax(dim=1)
        chosen = self._take(scores, real, inputs.groups) & real.unsqueeze(1) & self.active
        return self.sparse(logits, probabilities, chosen, renormalise=False)

    def _take(self, scores: Tensor, real: Tensor, groups: int) -> Tensor:
        """[N, M] bool: the tokens whose rank in their sequence is within the expert's share."""
        scores = scores.masked_fill(~real.unsqueeze(1), float("-inf")).unflatten(0, (groups, -1))
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)  # [G, T, M]
        tokens = real.unflatten(0, (groups, -1)).sum(dim=1)
        share = (tokens.double() * self.capacity / self.active.sum()).ceil()  # [G]
        return (rank < share.view(-1, 1, 1)).flatten(0, 1)

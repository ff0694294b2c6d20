"""Cost-aware routing: large experts must be worth their size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class CostAwareRouter(
    Router, name="cost-aware", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 11"
):
    """The expert of largest score minus lambda times its cost, with its probability as gate.

    Zhang et al. 2025 (arXiv 2507.11181), Eq. 11. Our choices: an expert's cost is its number of
    hidden units relative to the mean of the living experts, and the gate is the softmax of the
    scores alone. It differs from top-1 only where experts differ in size.
    """

    k = 1
    steerable = True
    uses_sizes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the cost-aware router."""

        cost_weight: float = 0.1
        """lambda: what the score of an expert of mean size is lowered by"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if config.cost_weight < 0:
            raise UserError(
                f"cost-aware router: cost_weight={config.cost_weight} must be at least 0"
            )
        super().__init__(dim, num_experts, max_experts, generator)
        self.cost_weight = config.cost_weight

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] by scores and `given.sizes` [M].

        Raises:
            UserError: the experts' sizes are not known.
        """
        if given.sizes is None:
            raise UserError(
                "cost-aware router: the experts have no sizes; choose a bank of hidden units, such "
                "as pool"
            )
        logits = self.mask(F.linear(given.x, self.weight))
        sizes = torch.where(self.alive, given.sizes, 0).to(logits.dtype)
        cost = sizes * self.alive.sum() / sizes.sum()
        chosen = self.choose(logits - self.cost_weight * cost, 1)
        return self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=False)

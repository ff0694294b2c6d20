"""Top-p routing: as many experts as it takes to reach a probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class TopPRouter(Router, name="top-p", source="Huang et al. 2024 (arXiv 2403.07652), Section 2"):
    """The fewest experts whose probabilities add up to p, the most probable first.

    Huang et al. 2024 (arXiv 2403.07652), Section 2: hard samples use more experts. At least one is
    used; of equally probable experts the older one comes first.
    """

    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the top-p router."""

        p: float = 0.4
        """probability that the chosen experts must reach together"""
        renormalise: bool = True
        """divide the gates of a sample by their sum where it uses two experts or more; one alone
        keeps its probability, or the router would get no gradient there (our choice)"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 0 < config.p <= 1:
            raise UserError(f"top-p router: p={config.p} must be above 0, at most 1")
        super().__init__(dim, num_experts, max_experts, generator)
        self.p = config.p
        self.renormalise = config.renormalise

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D]; the selection bias counts in the order, not in the probabilities."""
        logits = self.mask(F.linear(given.x, self.weight))
        probabilities = logits.softmax(dim=1)
        order = (logits.detach() + self.selection_bias).argsort(dim=1, descending=True, stable=True)
        ordered = probabilities.detach().gather(1, order)
        before = ordered.cumsum(dim=1) - ordered
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, before < self.p)
        chosen = chosen & self.alive
        routing = self.sparse(logits, probabilities, chosen, self.renormalise)
        alone = torch.where(chosen, probabilities, 0.0)
        routing.gates = torch.where(routing.used() == 1, alone, routing.gates)
        return routing

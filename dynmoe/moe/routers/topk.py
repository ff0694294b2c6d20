"""Sparse routing: each sample uses its K best experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class TopKRouter(Router, name="topk", source="Shazeer et al. 2017 (arXiv 1701.06538), Section 2.1"):
    """The K experts with the largest linear score, weighted by their softmax probability.

    Shazeer et al. 2017 (arXiv 1701.06538), Section 2.1, without noise. Chosen probabilities are
    renormalised for K >= 2 only: a renormalised single gate is 1 whatever the logits, and its
    router gradient exactly zero.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the top-k router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 1 <= config.k <= max_experts:
            raise UserError(f"topk router: k={config.k} must be between 1 and {max_experts}")
        super().__init__(dim, num_experts, max_experts, generator)
        self.k = config.k

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to its min(K, E) best experts."""
        logits = self.mask(F.linear(given.x, self.weight))
        probabilities = logits.softmax(dim=1)
        chosen = self.choose(logits, self.k)  # probabilities may tie at 0 in float32
        return self.sparse(logits, probabilities, chosen, renormalise=self.k > 1)

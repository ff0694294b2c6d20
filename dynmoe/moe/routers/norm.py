"""Norm routing: the longer a sample's vector, the more experts it uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class NormRouter(Router, name="norm", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 17"):
    """The k(x) best experts, `k(x) = min(k_max, floor(tau ||x||))`, at least one.

    Zhang et al. 2025 (arXiv 2507.11181), Eq. 17; the least of one is our choice. Gates are softmax
    probabilities, renormalised over the chosen where they are two or more: one gate alone would be
    1 whatever the logits, and the router's gradient exactly zero.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the norm router."""

        k_max: int = 2
        """most experts per sample; all of them while fewer exist"""
        tau: float = 1.0
        """experts per unit of Euclidean length of the sample"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 1 <= config.k_max <= max_experts:
            raise UserError(
                f"norm router: k_max={config.k_max} must be between 1 and {max_experts}"
            )
        if config.tau <= 0:
            raise UserError(f"norm router: tau={config.tau} must be above 0")
        super().__init__(dim, num_experts, max_experts, generator)
        self.k = config.k_max
        self.tau = config.tau

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to its min(k(x), E) best experts."""
        logits = self.mask(F.linear(given.x, self.weight))
        probabilities = logits.softmax(dim=1)
        count = (self.tau * given.x.detach().norm(dim=1, keepdim=True)).floor().clamp(1, self.k)
        order = (logits.detach() + self.selection_bias).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        chosen = (rank < count) & self.alive
        routing = self.sparse(logits, probabilities, chosen, renormalise=True)
        alone = torch.where(chosen, probabilities, 0.0)
        routing.gates = torch.where(routing.used() == 1, alone, routing.gates)
        return routing

"""A soft router by distance: softmax of the negative distances to one point per expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynmoe.errors import UserError
from dynmoe.moe.linear import distances
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class LaplaceRouter(
    Router, name="laplace", source="Nguyen et al. 2024 (arXiv 2410.02935), Laplace gating"
):
    """Softmax of `-||x - w_e||_2`, all experts weighted: near experts get the weight.

    Laplace gating of Nguyen et al. 2024 (arXiv 2410.02935); the temperature is ours. A logit
    difference is at most `||w_e - w_f|| / temperature`, however far x is.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the Laplace router."""

        temperature: float = 1.0
        """divides the distances; smaller is sharper"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if config.temperature <= 0:
            raise UserError(f"laplace router: temperature={config.temperature} must be above 0")
        super().__init__(dim, num_experts, max_experts, generator)
        self.temperature = config.temperature

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D]: `softmax(-||x - w_e|| / temperature)`."""
        logits = -distances(given.x, self.weight) / self.temperature
        return self.dense(logits.to(given.x.dtype))

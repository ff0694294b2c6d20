"""The plain soft router of DynamicMoE: softmax of a linear map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class SoftmaxRouter(Router, name="softmax", source="Kim 2025 (arXiv 2511.18987)"):
    """Softmax of a linear map, all experts weighted: the plain form of DynamicMoE (2511.18987)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the softmax router."""

        temperature: float = 1.0
        """divides the logits"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if config.temperature <= 0:
            raise UserError(f"softmax router: temperature={config.temperature} must be above 0")
        super().__init__(dim, num_experts, max_experts, generator)
        self.temperature = config.temperature

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D]: `softmax((x W^T) / temperature)`."""
        return self.dense(F.linear(given.x, self.weight) / self.temperature)

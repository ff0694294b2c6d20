"""One expert per sample at full strength, with a gradient all the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dynmoe.moe.draws import draw_normal
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class StraightThroughRouter(
    Router, name="straight-through", source="Fan et al. 2025 (arXiv 2511.13760), MoE-LayerNorm"
):
    """The most probable expert with gate 1, whose gradient is that of `log p`.

    The gate is p / stopgrad(p): its value says nothing about how sure the router is, its gradient
    dp / p trains the router. Linear with a bias; weights Xavier-normal over all M rows (for layers
    that do not grow these are the E of the authors' code), biases 0.

    Attributes:
        weight: Parameter [M, D]. bias: Parameter [M].
    """

    k = 1
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """The straight-through router has no options."""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(dim, num_experts, max_experts, generator)
        self.bias = nn.Parameter(torch.zeros(max_experts))

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to one expert each."""
        logits = self.mask(F.linear(given.x, self.weight, self.bias))
        chosen = self.choose(logits, 1)
        p = logits.softmax(dim=1)
        fixed = p.detach()
        # In this form the value is exactly 1, and 0 / 0 cannot happen.
        gate = 1 + (p - fixed) / fixed.clamp_min(torch.finfo(p.dtype).tiny)
        return Routing(
            gates=torch.where(chosen, gate, 0.0),
            logits=logits,
            probabilities=p,
            alive=self.alive,
            chosen=chosen,
        )

    @torch.no_grad()
    def draw_rows(self, index: torch.Tensor, generator: torch.Generator | None) -> None:
        """Draw the rows `index` [n] afresh: N(0, 2 / (D + M)), biases 0."""
        experts, dim = self.weight.shape
        draw_normal(self.weight, index, (2 / (dim + experts)) ** 0.5, generator)
        for name, rows in [*self.named_parameters(recurse=False), *self.named_buffers()]:
            if name in ("bias", "logit_shift", "selection_bias"):
                rows[index] = 0.0

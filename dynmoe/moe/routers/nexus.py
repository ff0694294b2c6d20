"""Routing by domains: rows are projected from embeddings of what the experts were trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_linear, seeded_linear
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option
from dynmoe.registry import PartConfig


class NexusRouter(Router, name="nexus", source="Gritsch et al. 2024 (arXiv 2408.15901), Nexus"):
    """Softmax of `x . P(d_e)`: P, learned, makes an expert's row of its domain's embedding d_e.

    The embeddings are given, such as the mean of a text or image encoder over the data that an
    expert was trained on (`set_domain`), and take no gradient; until they are told they are random.
    P is `W_2 (silu(W_g d) * (W_1 d))`, D wide inside (ours). So an expert that comes later is
    routed to by what P has learnt of other domains, without training; its embedding changes no
    other row. Growth draws a random embedding for a new expert, which `set_domain` or `set_expert`
    replaces.

    Attributes:
        weight: Parameter [M, C] without gradient, the embeddings.
        gate, value, out: submodules, W_g, W_1 and W_2.
    """

    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the domain-embedding router."""

        dim: int = 16
        """width C of the domains' embeddings"""
        k: int = 0
        """experts per sample, the most probable ones, renormalised for 2 and more; 0 for all"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, num_experts, most, generator = size
        check_option(config, "dim", config.dim >= 1, "at least 1")
        check_option(config, "k", 0 <= config.k <= most, f"between 0 and {most}")
        super().__init__(config.dim, num_experts, most, generator)
        self.weight.requires_grad_(False)
        self.k = config.k or None
        self.gate = seeded_linear(config.dim, dim, generator, bias=False)
        self.value = seeded_linear(config.dim, dim, generator, bias=False)
        self.out = seeded_linear(dim, dim, generator, bias=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: all embeddings and maps are drawn again."""
        super().reset_parameters(generator)
        for linear in (self.gate, self.value, self.out):
            draw_linear(linear, generator)

    @torch.no_grad()
    def set_domain(self, expert: int, embedding: Tensor) -> None:
        """Say what an expert, or one to come, was trained on: an embedding [C].

        Raises:
            UserError: another shape, a number that is not finite, or no such expert.
        """
        most, dim = self.weight.shape
        if not 0 <= expert < most:
            raise UserError(f"nexus router: expert={expert} must be between 0 and {most - 1}")
        if embedding.shape != (dim,) or not bool(embedding.isfinite().all()):
            raise UserError(
                f"nexus router: a domain's embedding must be {dim} finite numbers (dim={dim}), and "
                f"here it has the shape {list(embedding.shape)}"
            )
        self.weight[expert] = embedding.to(self.weight)

    def rows(self) -> Tensor:
        """[M, D] the experts' rows, `P(d_e)`."""
        return self.out(F.silu(self.gate(self.weight)) * self.value(self.weight))

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]."""
        logits = F.linear(inputs.x, self.rows())
        if self.k is None:
            return self.dense(logits)
        logits = self.mask(logits)
        chosen = self.choose(logits, self.k)
        return self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=self.k > 1)

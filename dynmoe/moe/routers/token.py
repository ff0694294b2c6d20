"""The token gate of MoA: top-1 by cosine in a learned space, with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dynmoe.errors import UserError
from dynmoe.moe.linear import draw_linear, seeded_linear
from dynmoe.moe.noise import Noise
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class TokenRouter(
    Router,
    name="token",
    source="MoA's token gate; cosine scores after Chi et al. 2022 (arXiv 2204.09179), Section 3",
):
    """Top-1 by cosine to prototypes in a learned space of its own, with a learned temperature.

    The token gate of MoA: `q = normalise(A x + a)`, logits `cos(q, w_e) * exp(min(s, ln 100))`,
    s = ln 2 at the start. Training mode adds noise of standard deviation 1/E to the logits; the
    gate is the (noisy) probability of the expert picked, not renormalised. `Routing.logits` and
    `probabilities` are free of noise. `load` is the chance `Phi((P_e - max_f P'_f) E)`, P without
    noise and P' with it; 1/E is 0.25 for MoA's 4 experts.

    Attributes:
        weight: Parameter [M, dim], the prototypes.
        projection: submodule, A and a.
        log_scale: Parameter, scalar, s.
    """

    k = 1
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the token router."""

        dim: int = 256
        """width of the space in which tokens and prototypes are compared"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if config.dim < 1:
            raise UserError(f"token router: dim={config.dim} must be at least 1")
        super().__init__(config.dim, num_experts, max_experts, generator)
        self.projection = seeded_linear(dim, config.dim, generator)
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))
        self.noise = Noise(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: space, temperature and noise included."""
        super().reset_parameters(generator)
        draw_linear(self.projection, generator)
        self.log_scale.fill_(math.log(2.0))
        self.noise.reset_parameters(generator)

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to one expert each."""
        query = F.normalize(self.projection(given.x), dim=1)
        scale = self.log_scale.clamp(max=math.log(100.0)).exp()
        logits = self.mask(F.linear(query, F.normalize(self.weight, dim=1)) * scale)
        probabilities = logits.softmax(dim=1)
        noisy, used = logits, probabilities
        if self.training:
            noisy = logits + self.noise.normal(logits) / self.alive.sum()
            used = noisy.softmax(dim=1)
        routing = self.sparse(logits, used, self.choose(noisy, 1), renormalise=False)
        routing.probabilities = probabilities
        gap = probabilities - used.amax(dim=1, keepdim=True)
        load = torch.special.ndtr(gap * self.alive.sum())
        routing.load = torch.where(self.alive, load, 0.0)
        return routing

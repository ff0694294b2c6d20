"""Routing by a mixture model of the input, fitted to the input alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_entries, every
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class DomainRouter(
    Router, name="domain", source="after Hua et al. 2025 (arXiv 2510.16448); the mixture is ours"
):
    """Experts are components of a Gaussian mixture of x; gates are its posterior probabilities.

    The idea of Input Domain Aware MoE (Hua et al. 2025, arXiv 2510.16448): a probabilistic mixture
    model routes, and is trained apart from the task. The rest is our choice: Gaussians with a
    mean, a diagonal variance and a prior weight per expert. The gates are cut off from the task's
    gradient, x from the mixture's. In training mode the router adds a loss `likelihood`: the
    negative log likelihood of x per dimension, nats. Logits and probabilities keep their gradient
    for auxiliary losses. The start suits features of scale 1. Densities are computed in float32 or
    wider, since they cancel in half precision; gates come in the dtype of x.

    Attributes:
        weight: Parameter [M, D], the means.
        log_variance: Parameter [M, D]; variances are `floor + exp` of it.
        prior: Parameter [M], logits of the components' weights.
    """

    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the domain router."""

        k: int = 0
        """experts per sample, the most probable ones; 0 for all"""
        likelihood: float = 1.0
        """factor of the mixture's own loss"""
        floor: float = 1e-3
        """least variance; keeps a component from shrinking onto one sample"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 0 <= config.k <= max_experts:
            raise UserError(f"domain router: k={config.k} must be between 0 and {max_experts}")
        if config.likelihood < 0:
            raise UserError(f"domain router: likelihood={config.likelihood} must be at least 0")
        if config.floor <= 0:
            raise UserError(f"domain router: floor={config.floor} must be above 0")
        super().__init__(dim, num_experts, max_experts, generator)
        self.k = config.k or None
        self.likelihood, self.floor = config.likelihood, config.floor
        self.log_variance = nn.Parameter(torch.empty(max_experts, dim))
        self.prior = nn.Parameter(torch.empty(max_experts))
        for rows in (self.log_variance, self.prior):
            draw_entries(rows, 0, every(rows), dim**-0.5, generator)

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D]; logits are `log N(x; mean_e, variance_e) + prior_e`."""
        x = given.x.detach().to(torch.promote_types(given.x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            logits = self.mask(self._log_density(x) + self.prior)
        probabilities = logits.softmax(dim=1)
        gates = probabilities.detach().to(given.x.dtype)
        if self.k is None:
            routing = Routing(
                gates=gates,
                logits=logits,
                probabilities=probabilities,
                alive=self.alive,
            )
        else:
            chosen = self.choose(logits, self.k)
            routing = self.sparse(logits, gates, chosen, renormalise=self.k > 1)
            routing.probabilities = probabilities
        if self.training:
            routing.losses["likelihood"] = self.likelihood * self._loss(logits, given)
        return routing

    def _log_density(self, x: Tensor) -> Tensor:
        """[N, M] log density of x [N, D] under each component; finite for unborn ones, too."""
        born = self.alive.unsqueeze(1)
        mean = torch.where(born, self.weight.to(x.dtype), 0.0)
        variance = self.floor + torch.where(born, self.log_variance.to(x.dtype), 0.0).exp()
        quadratic = (
            F.linear(x.square(), 1 / variance)
            - 2 * F.linear(x, mean / variance)
            + (mean.square() / variance).sum(dim=1)
        )
        constant = variance.log().sum(dim=1) + x.shape[1] * math.log(2 * math.pi)
        return -0.5 * (quadratic + constant)

    def _loss(self, logits: Tensor, given: RouterInput) -> Tensor:
        """Mean negative log likelihood of the real samples per dimension, nats."""
        log_likelihood = logits.logsumexp(dim=1) - self.mask(self.prior).logsumexp(dim=0)
        real = given.mask
        if real is not None:
            log_likelihood = torch.where(real, log_likelihood, 0.0)
        count = max(len(logits), 1) if real is None else real.sum().clamp(min=1)
        return -log_likelihood.sum() / count / given.x.shape[1]

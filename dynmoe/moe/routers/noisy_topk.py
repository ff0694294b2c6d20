"""Sparse routing with noise on the scores, which lets the experts next in line be tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_entries, every
from dynmoe.moe.noise import Noise
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class NoisyTopKRouter(
    Router, name="noisy-topk", source="Shazeer et al. 2017 (arXiv 1701.06538), Section 2.1, App. A"
):
    """The K experts of largest noisy score `x W^T + N(0, 1) softplus(x W_noise^T)`.

    Shazeer et al. 2017 (arXiv 1701.06538), Section 2.1, Eqs. 3-5; Zhang et al. 2025 (arXiv
    2507.11181), Eqs. 2-4. Noise is added in training mode only. As in the plain top-k router,
    chosen probabilities are renormalised for K >= 2 only.

    Attributes:
        noise_weight: Parameter [M, D], zero at first (Shazeer et al., App. A), so that every score
            starts with noise of softplus(0) = 0.69. Rows of experts born later are drawn as all
            rows are (our choice). None with fixed noise.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the noisy top-k router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""
        noise: Literal["learned", "fixed"] = "learned"
        """learned: the noise's scale is softplus(x W_noise^T); fixed: it is sigma"""
        sigma: float = 1.0
        """standard deviation of fixed noise"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 1 <= config.k <= max_experts:
            raise UserError(f"noisy-topk router: k={config.k} must be between 1 and {max_experts}")
        if config.sigma <= 0:
            raise UserError(
                f"noisy-topk router: sigma={config.sigma} must be above 0; topk has no noise"
            )
        super().__init__(dim, num_experts, max_experts, generator)
        self.k = config.k
        self.sigma = config.sigma
        self.noise_weight = (
            nn.Parameter(torch.zeros(max_experts, dim)) if config.noise == "learned" else None
        )
        self.noise = Noise(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start; rows of the noise are 0 there, so none are drawn."""
        self.reset_buffers()
        draw_entries(self.weight, 0, every(self.weight), self.weight.shape[1] ** -0.5, generator)
        if self.noise_weight is not None:
            self.noise_weight.zero_()
        self.noise.reset_parameters(generator)

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to the min(K, E) experts of largest noisy score; fills `load`."""
        clean = F.linear(given.x, self.weight)
        if self.noise_weight is None:
            scale = torch.full_like(clean, self.sigma)
        else:
            scale = F.softplus(F.linear(given.x, self.noise_weight))
        noisy = clean
        if self.training:
            noisy = clean + self.noise.normal(clean) * scale
        logits = self.mask(noisy)
        chosen = self.choose(logits, self.k)
        routing = self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=self.k > 1)
        routing.load = self._load(clean + self.logit_shift, scale, logits, chosen)
        return routing

    def _load(self, clean: Tensor, scale: Tensor, noisy: Tensor, chosen: Tensor) -> Tensor:
        """[N, M] chance that an expert is chosen if its noise alone is drawn anew.

        Shazeer et al. 2017, App. A, Eqs. 8-10: `Phi((clean_i - kth_excluding(noisy, k, i)) /
        scale_i)`. It is 1 while no more than K experts exist, which all are chosen then. The
        selection bias counts as part of the scores, since they are compared with it.

        Args:
            clean, scale: [N, M] scores and standard deviations of their noise.
            noisy: [N, M] scores as drawn, -inf for experts that do not exist yet.
            chosen: [N, M] bool.
        """
        clean, noisy = clean + self.selection_bias, noisy + self.selection_bias
        best = noisy.topk(min(self.k + 1, noisy.shape[1]), dim=1).values
        # The k-th best of the others: the next one down for an expert that is chosen itself.
        threshold = torch.where(chosen, best[:, -1:], best[:, self.k - 1 : self.k])
        threshold = threshold.masked_fill(threshold == -torch.inf, 0.0)
        distance = (clean - threshold) / scale.clamp_min(torch.finfo(scale.dtype).eps)
        load = torch.where(self.alive.sum() <= self.k, 1.0, torch.special.ndtr(distance))
        return torch.where(self.alive, load, 0.0)

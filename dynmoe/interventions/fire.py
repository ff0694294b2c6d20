"""Orthogonal weights at each task start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.periodic import Periodic
from dynmoe.interventions.weights import weight_matrices


class FIRE(Periodic, name="fire", source="Han et al. 2026 (arXiv 2602.08040)"):
    """At each task start, moves every weight matrix to, or near, its nearest orthogonal matrix.

    `W <- sqrt(d_out / d_in) * polar(W)`, with the polar factor by Newton-Schulz iterations
    `X <- 1.5 X - 0.5 X X^T X` from `W / ||W||_F`. A convolution is treated tap by tap and divided
    by the number of taps. Biases and optimizer state are left alone.

    The authors' 10 iterations are no full orthogonalisation: they bring singular values of W
    within 1e-2 of 1 (before the scale) that are above 0.04 ||W||_F, and multiply small ones by
    1.5^10 / ||W||_F = 58 / ||W||_F. A new [128, 784] matrix ends within 1e-3, a new square
    [128, 128] one with its least between 0.001 and 0.05. `factor=svd` takes the exact polar
    factor, whose singular values are all 1.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Periodic.Config):
        """Options of FIRE."""

        iterations: int = 10
        """of Newton-Schulz"""
        factor: Literal["newton-schulz", "svd"] = "newton-schulz"
        """polar factor by the iterations, as the authors do, or exactly by the singular value
        decomposition"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.iterations < 1:
            raise UserError(f"fire: iterations={config.iterations} must be at least 1")
        if config.factor not in ("newton-schulz", "svd"):
            raise UserError(f"fire: factor={config.factor} must be newton-schulz or svd")

    @torch.no_grad()
    def act(self) -> None:
        """Replace all matrices."""
        exact = self.config.factor == "svd"
        for slot in weight_matrices(self.model):
            weight = slot.parameter
            taps = weight.flatten(2).movedim(2, 0) if weight.dim() > 2 else weight.unsqueeze(0)
            scale = math.sqrt(weight.shape[0] / weight.shape[1]) / len(taps)
            new = scale * (exact_polar(taps) if exact else polar(taps, self.config.iterations))
            weight.copy_(new.movedim(0, 2).reshape(weight.shape))


def polar(matrices: Tensor, iterations: int) -> Tensor:
    """Nearly the orthogonal polar factors of `[..., n, m]`; zero matrices stay zero."""
    norm = matrices.flatten(-2).norm(dim=-1).clamp_min(1e-12)
    x = matrices / norm[..., None, None]
    wide = x.shape[-1] > x.shape[-2]
    x = x.mT if wide else x
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x.mT if wide else x


def exact_polar(matrices: Tensor) -> Tensor:
    """The orthogonal polar factors of `[..., n, m]`; zero matrices stay zero."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right * matrices.any(dim=(-2, -1), keepdim=True)

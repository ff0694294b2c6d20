"""MIRO: the features of every block keep their information about a pre-trained oracle's."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.registry import PartConfig

LEAST_VARIANCE = 1e-5
START_VARIANCE = 0.1


class MIRO(DGMethod, name="miro", source="Cha et al. 2022 (arXiv 2203.10789), MIRO"):
    """ERM with a bound on the mutual information of its features and a frozen oracle's.

    The oracle is the backbone as it was given. Per block the penalty is the mean over all numbers
    of `(log var + (z_oracle - z)^2 / var) / 2`: the mean encoder is the identity, the variance one
    learned bias per channel behind a softplus, as the authors chose. The blocks' sum counts
    `weight` times. Their ten times larger learning rate of the variances is left out. A step runs
    the oracle too.

    Attributes:
        oracle: frozen copy of the backbone.
        variances: per block, [D] before the softplus.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of MIRO."""

        weight: float = 0.1
        """lambda, of the penalty (the paper searches 0.01 to 1)"""

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Keep the oracle."""
        if not 0 <= config.weight < float("inf"):
            raise UserError(f"miro: weight={config.weight} must be a number of at least 0")
        self.weight = config.weight
        self.oracle = copy.deepcopy(self.backbone).requires_grad_(False)
        start = math.log(math.exp(START_VARIANCE - LEAST_VARIANCE) - 1)
        depth = len(self.backbone.blocks)  # type: ignore[arg-type]
        self.variances = nn.ParameterList(torch.full((self.dim,), start) for _ in range(depth))

    def train(self, mode: bool = True) -> MIRO:
        """As of any module, but the oracle stays in evaluation mode."""
        super().train(mode)
        self.oracle.eval()
        return self

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]; in training mode the penalty "information"."""
        if not self.training:
            return super().outputs(images, embedding)
        z, own = by_block(self.backbone, images)
        with torch.no_grad():
            _, given = by_block(self.oracle, images)
        bounds = [
            information_loss(a, b, v) for a, b, v in zip(own, given, self.variances, strict=True)
        ]
        return self.head(z).unsqueeze(0), {"information": self.weight * torch.stack(bounds).sum()}


def information_loss(own: Tensor, oracle: Tensor, variance: Tensor) -> Tensor:
    """Mean of `(log var + (oracle - own)^2 / var) / 2` over [B, N, D]; variance [D] is raw.

    Up to a constant, the negative log-likelihood of the oracle's features under a Gaussian about
    the model's own.
    """
    var = F.softplus(variance) + LEAST_VARIANCE
    return (var.log() + (oracle - own).square() / var).mean() / 2


def by_block(backbone: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features [B, D], and what each block puts out [B, N, D]."""
    seen: list[Tensor] = []
    blocks: Any = backbone.blocks
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append(out)) for b in blocks]
    try:
        return features(backbone, images), seen
    finally:
        for hook in hooks:
            hook.remove()

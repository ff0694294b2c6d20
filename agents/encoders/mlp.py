"""An encoder for vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from agents.encoder import Encoder, check_sizes, orthogonal


class MLP(Encoder, name="mlp"):
    """Linear layers with tanh, for vector observations; images are flattened."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the MLP."""

        widths: tuple[int, ...] = (128,)
        """width of each layer"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_sizes("mlp", widths=config.widths)
        widths = [math.prod(shape), *config.widths]
        self.layers = nn.Sequential(nn.Flatten())
        for before, after in pairwise(widths):
            self.layers.append(orthogonal(nn.Linear(before, after)))
            self.layers.append(nn.Tanh())
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.layers(x)

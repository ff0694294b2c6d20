"""The convolutional network of the Craftax baselines."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from agents.encoder import Encoder, check_sizes, flat_features, image_shape, orthogonal


class Conv(
    Encoder,
    name="conv",
    source="after Matthews et al. 2024 (arXiv 2402.16801), Craftax_Baselines' ActorCriticConv",
):
    """Three 5x5 convolutions with 3x3 pooling, shaped like Craftax_Baselines' ActorCriticConv.

    Pooling stands before the ReLU: the two commute, and a ninth of the values is left to rectify.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the convolutional network."""

        hidden: int = 512
        """hidden units of each block: the budget of its experts at the start"""
        actor_tail: bool = True
        """one more linear layer, as wide as there are actions, behind the actor's block"""
        channels: int = 32
        """channels of each convolution"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_sizes("conv", channels=config.channels)
        widths = [image_shape("conv", shape, 27)[0], *[config.channels] * 3]
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            self.layers.append(orthogonal(nn.Conv2d(before, after, 5, padding=2)))
            self.layers.append(nn.MaxPool2d(3))
            self.layers.append(nn.ReLU())
        self.layers.append(nn.Flatten())
        self.out_features = flat_features(self.layers, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]: F = 512 for Craftax, 128 for Craftax Classic."""
        return self.layers(x)

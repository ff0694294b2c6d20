"""A small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.network import Trunk


class SmallCNN(Trunk, name="cnn"):
    """Two strided ReLU convolutions, 4x4 stride 4 and 3x3 stride 2.

    Without normalisation it is quick to lose its plasticity.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Trunk.Config):
        """Options of the small CNN."""

        channels: int = 16
        """channels of the first convolution; the second has twice as many"""

    def __init__(self, config: Config, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if min(shape[1:]) < 8:
            raise UserError(f"cnn: images are {shape[1]}x{shape[2]}, it needs 8x8 or more; use mlp")
        c = config.channels
        self.convolutions = nn.Sequential(
            nn.Conv2d(shape[0], c, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        height, width = ((s // 4 + 1) // 2 for s in shape[1:])
        self.out_features = 2 * c * height * width

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.convolutions(x)

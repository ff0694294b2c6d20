"""The small residual network of IMPALA."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from agents.encoder import Encoder, check_sizes, flat_features, image_shape, orthogonal


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), [B, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            orthogonal(nn.Conv2d(channels, channels, 3, padding=1)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.layers(x)


class Impala(Encoder, name="impala", source="Espeholt et al. 2018 (arXiv 1802.01561)"):
    """Residual blocks behind 3x3 convolutions and pooling (Espeholt et al. 2018, 1802.01561)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the small IMPALA network."""

        channels: tuple[int, ...] = (16, 32, 32)
        """channels of each stage"""
        blocks: int = 1
        """residual blocks per stage; the paper's large network has 2"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_sizes("impala", channels=config.channels)
        check_sizes("impala", least=0, blocks=config.blocks)
        widths = [image_shape("impala", shape, 8)[0], *config.channels]
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            self.layers.append(orthogonal(nn.Conv2d(before, after, 3, padding=1)))
            self.layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for _ in range(config.blocks):
                self.layers.append(Residual(after))
        self.layers.extend([nn.ReLU(), nn.Flatten()])
        self.out_features = flat_features(self.layers, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.layers(x)

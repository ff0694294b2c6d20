"""A stem that reads the frame tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from agents.encoder import Encoder, check_sizes, flat_features, image_shape, orthogonal
from dynmoe.errors import UserError


class Patch(Encoder, name="patch"):
    """One convolution per tile, then 3x3 between tiles: the cheapest reader of a tiled screen."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the patch stem."""

        tile: int = 0
        """pixels a tile is wide; 0 for Craftax's own: 10, or 7 in Classic"""
        channels: int = 64
        """channels of the stem"""
        mixed: int = 32
        """channels of the 3x3 convolution between tiles"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_sizes("patch", channels=config.channels, mixed=config.mixed)
        channels, height, width = image_shape("patch", shape, 7)
        tile = config.tile or next((t for t in (10, 7) if not (height % t or width % t)), 0)
        if tile < 1 or height % tile or width % tile:
            raise UserError(
                f"encoder patch: tile={config.tile} does not suit frames of {height}x{width}; set "
                "--encoder.tile to a divisor of both"
            )
        self.layers = nn.Sequential(
            orthogonal(nn.Conv2d(channels, config.channels, tile, stride=tile)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(config.channels, config.mixed, 3, padding=1)),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.out_features = flat_features(self.layers, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.layers(x)

"""The convolutional network of DQN."""

from __future__ import annotations

from torch import Tensor, nn

from agents.encoder import Encoder, flat_features, image_shape, orthogonal


class Nature(Encoder, name="nature", source="Mnih et al. 2015 (Nature 518)"):
    """8x8, 4x4 and 3x3 strided convolutions (Mnih et al. 2015, "NatureCNN")."""

    def __init__(self, config: Encoder.Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels = image_shape("nature", shape, 36)[0]
        self.layers = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3)),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.out_features = flat_features(self.layers, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.layers(x)

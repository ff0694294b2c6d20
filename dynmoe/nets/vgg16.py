"""VGG-16 with batch normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.network import Trunk


class VGG16(Trunk, name="vgg16", source="Simonyan and Zisserman 2015 (arXiv 1409.1556)"):
    """VGG-16-BN (Simonyan & Zisserman 2015, arXiv 1409.1556) under an MLP head.

    Used for continual Tiny ImageNet by Lee et al. 2024 (Hare & Tortoise, arXiv 2406.02596).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Trunk.Config):
        """Options of VGG-16."""

        width: int = 512
        hidden: int = 1024
        blocks: int = 1

    def __init__(self, config: Config, shape: tuple[int, int, int]) -> None:
        from torchvision.models import vgg16_bn

        super().__init__()
        if min(shape[1:]) < 32:
            raise UserError(f"vgg16: images are {shape[1]}x{shape[2]}, it needs 32x32 or more")
        features = vgg16_bn(weights=None, num_classes=1).features
        if shape[0] != 3:
            features[0] = nn.Conv2d(shape[0], 64, 3, padding=1)
        self.features = features
        self.out_features = 512 * (shape[1] // 32) * (shape[2] // 32)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 512 * H/32 * W/32]."""
        return self.features(x).flatten(1)

"""ResNet-18 for small images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dynmoe.network import Trunk


class ResNet18(Trunk, name="resnet18", source="He et al. 2016 (arXiv 1512.03385)"):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) for small images.

    Its stem is a 3x3 convolution without max-pooling, as usual for images of 32 to 64 pixels.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Trunk.Config):
        """Options of ResNet-18."""

        width: int = 512
        hidden: int = 1024

    def __init__(self, config: Config, shape: tuple[int, int, int]) -> None:
        from torchvision.models import resnet18

        super().__init__()
        net = resnet18(weights=None, num_classes=1)
        net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
        net.fc = nn.Identity()
        self.net = net
        self.out_features = 512

    def forward(self, x: Tensor) -> Tensor:
        """Globally pooled features [B, 512]."""
        return self.net(x)

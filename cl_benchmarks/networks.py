"""Networks that carry MoE layers: trunks, hidden blocks, a linear classifier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig

MakeBlock = Callable[[int, int], nn.Module]
"""(width, hidden units) -> module [B, W] -> [B, W]"""


class Trunk(nn.Module, Part, kind="network"):
    """Base of all trunks: images to flat features. `out_features` is F."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every network: its head."""

        width: int = 128
        """width in and out of the hidden blocks"""
        hidden: int = 256
        """hidden units of each block: the parameter budget that experts share"""
        blocks: int = 1
        """hidden blocks before the classifier"""
        place: Literal["last", "all"] = "last"
        """which hidden blocks are MoE layers in the methods that have them"""

    out_features: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F] of images x [B, C, H, W]."""


def dense_block(width: int, hidden: int) -> nn.Module:
    """The dense counterpart of an MoELayer: a two-layer ReLU MLP, [B, W] -> [B, W]."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class Network(nn.Module):
    """Trunk, neck, hidden blocks with a ReLU between two of them, and classifier.

    The last block feeds the classifier without a ReLU: units of a ReLU there die in the shock of a
    growth, and no growth of the block before can bring them back.

    Args:
        trunk: [B, C, H, W] -> [B, F].
        config: the head's sizes.
        classes: outputs.
        make_block: makes the blocks at `config.place`; the others are dense.
    """

    def __init__(
        self, trunk: Trunk, config: Trunk.Config, classes: int, make_block: MakeBlock = dense_block
    ) -> None:
        super().__init__()
        if config.blocks < 1 or config.hidden < 1 or config.width < 1:
            raise UserError(
                f"network: blocks={config.blocks}, hidden={config.hidden} and width={config.width} "
                "must each be at least 1"
            )
        plain = config.blocks - 1 if config.place == "last" else 0
        makers = [dense_block] * plain + [make_block] * (config.blocks - plain)
        self.trunk = trunk
        self.neck = nn.Sequential(nn.Linear(trunk.out_features, config.width), nn.ReLU())
        self.blocks = nn.Sequential()
        for number, make in enumerate(makers):
            if number:
                self.blocks.append(nn.ReLU())
            self.blocks.append(make(config.width, config.hidden))
        self.classifier = nn.Linear(config.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images x [B, C, H, W]."""
        return self.classifier(self.blocks(self.neck(self.trunk(x))))


def build_network(
    config: Trunk.Config,
    shape: tuple[int, int, int],
    classes: int,
    make_block: MakeBlock = dense_block,
) -> Network:
    """A network for images of `shape` (C, H, W); draws weights from torch's global generator."""
    return Network(config.build(shape), config, classes, make_block)


class MLP(Trunk, name="mlp"):
    """Flattened pixels straight into the head."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Trunk.Config):
        """Options of the MLP."""

        width: int = 100
        hidden: int = 200

    def __init__(self, config: Config, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.out_features = shape[0] * shape[1] * shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C*H*W]."""
        return x.flatten(1)


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

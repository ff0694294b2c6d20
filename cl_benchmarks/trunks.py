"""Trunks of networks, by name: what makes features of images."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig


class MakeBlock(Protocol):
    """Makes a block of a network: [B, dim_in] -> [B, dim_out]."""

    def __call__(self, dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
        """A block of `hidden` units.

        With `images` it maps images [B, dim_in, h, w] to [B, dim_out, h, w]; units are channels.
        """


class Trunk(nn.Module, Part, kind="network"):
    """Base of all trunks: images to flat features. `out_features` is F."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every network: its head, and where its MoE layers are."""

        width: int = 128
        """width in and out of the hidden blocks"""
        hidden: int = 256
        """hidden units of each block: the parameter budget that experts share"""
        blocks: int = 1
        """hidden blocks before the classifier"""
        neck: bool = True
        """a linear layer with ReLU between trunk and blocks; without it the blocks read the trunk's
        features, and are as wide as those are many"""
        place: Literal["last", "all", "head", "trunk", "everywhere"] = "last"
        """what is an MoE layer in the methods that have them. last, all: hidden blocks; head: the
        last block and the classifier as one block, from the features to the classes; trunk: a block
        of convolutions in the trunk, for --bank conv; everywhere: that, with bank conv, and all
        hidden blocks"""
        norm: bool = False
        """normalise the trunk's features of each image (layer normalisation without weights):
        features of a trunk that stands still are then learnt from faster"""
        statistics: bool = False
        """beside the trunk's features, means and deviations of the image's channels and of their
        gradients: what its style changes, and a router can tell domains by"""
        trunk_hidden: int = 0
        """hidden channels of the block in the trunk; 0 for as many as it gives out"""

    out_features: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F] of images x [B, C, H, W]."""

    def place_block(self, make_block: MakeBlock, hidden: int) -> None:
        """Put a block of images where this trunk has its place for one.

        Args:
            make_block: makes it.
            hidden: hidden channels; 0 for as many as it gives out.

        Raises:
            UserError: this trunk has no such place.
        """
        raise UserError(
            f"network {self.name} has no place for an MoE layer in its trunk; use --network.place "
            "last, all or head, or another network"
        )


def scaled(channels: int, scale: float, name: str) -> int:
    """Channels of a layer times a scale, rounded.

    Raises:
        UserError: no channel would be left, or the scale is no number above 0.
    """
    if not 0 < scale < math.inf:
        raise UserError(f"{name}: scale={scale} must be a number above 0")
    if round(channels * scale) < 1:
        raise UserError(
            f"{name}: scale={scale} leaves a layer of {channels} channels empty; use at least "
            f"{1 / channels:g}"
        )
    return round(channels * scale)


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

    Without normalisation it is quick to lose its plasticity. The place in its trunk is behind the
    second convolution: one more block, whose outputs go to the neck without a ReLU.
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
        self.channels = 2 * c

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.convolutions(x)

    def place_block(self, make_block: MakeBlock, hidden: int) -> None:
        """One more block, behind the ReLU of the second convolution."""
        block = make_block(self.channels, hidden or self.channels, self.channels, images=True)
        self.convolutions.insert(4, block)


class VGG16(Trunk, name="vgg16", source="Simonyan and Zisserman 2015 (arXiv 1409.1556)"):
    """VGG-16-BN (Simonyan & Zisserman 2015, arXiv 1409.1556) under an MLP head.

    Used for continual Tiny ImageNet by Lee et al. 2024 (Hare & Tortoise, arXiv 2406.02596). The
    place in its trunk is that of the last convolution; its BatchNorm and ReLU stay.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Trunk.Config):
        """Options of VGG-16."""

        width: int = 512
        hidden: int = 1024
        blocks: int = 1
        scale: float = 1.0
        """channels of every convolution, as a multiple of the usual 64 to 512"""

    def __init__(self, config: Config, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if min(shape[1:]) < 32:
            raise UserError(f"vgg16: images are {shape[1]}x{shape[2]}, it needs 32x32 or more")
        self.features = _vgg16_features(config.scale)
        if shape[0] != 3:
            self.features[0] = nn.Conv2d(shape[0], scaled(64, config.scale, "vgg16"), 3, padding=1)
        self.channels = scaled(512, config.scale, "vgg16")
        self.out_features = self.channels * (shape[1] // 32) * (shape[2] // 32)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 512 * scale * H/32 * W/32]."""
        return self.features(x).flatten(1)

    def place_block(self, make_block: MakeBlock, hidden: int) -> None:
        """A block in place of the last convolution, which 4 modules come after."""
        block = make_block(self.channels, hidden or self.channels, self.channels, images=True)
        self.features[-4] = block


def _vgg16_features(scale: float) -> nn.Sequential:
    """The convolutions of VGG-16-BN, with torchvision's initial weights (Kaiming's, normal)."""
    from torchvision.models import vgg

    plan = [c if c == "M" else scaled(int(c), scale, "vgg16") for c in vgg.cfgs["D"]]
    if scale == 1:
        return vgg.vgg16_bn(weights=None, num_classes=1).features
    features = vgg.make_layers(plan, batch_norm=True)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return features


class ResNet18(Trunk, name="resnet18", source="He et al. 2016 (arXiv 1512.03385)"):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) for small images.

    Its stem is a 3x3 convolution without max-pooling, as usual for images of 32 to 64 pixels. The
    place in its trunk is that of the last convolution, the second of the last residual block; its
    BatchNorm and the sum with the block's input stay.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Trunk.Config):
        """Options of ResNet-18."""

        width: int = 512
        hidden: int = 1024
        scale: float = 1.0
        """channels of every convolution, as a multiple of the usual 64 to 512"""

    def __init__(self, config: Config, shape: tuple[int, int, int]) -> None:
        super().__init__()
        net = _resnet18(config.scale)
        stem = net.bn1.num_features
        net.conv1 = nn.Conv2d(shape[0], stem, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
        net.fc = nn.Identity()
        self.net = net
        self.out_features = scaled(512, config.scale, "resnet18")

    def forward(self, x: Tensor) -> Tensor:
        """Globally pooled features [B, 512 * scale]."""
        return self.net(x)

    def place_block(self, make_block: MakeBlock, hidden: int) -> None:
        """A block in place of the last convolution."""
        count = self.out_features
        last: Any = self.net.layer4[-1]
        last.conv2 = make_block(count, hidden or count, count, images=True)


def _resnet18(scale: float) -> Any:
    """Torchvision's ResNet-18, the channels of all layers times `scale`."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class Scaled(ResNet):
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
            if planes == 64:  # the first stage reads the stem, which is scaled below
                self.inplanes = scaled(64, scale, "resnet18")
            return super()._make_layer(block, scaled(planes, scale, "resnet18"), *args, **kwargs)

    net = Scaled(BasicBlock, [2, 2, 2, 2], num_classes=1)
    if scale != 1:
        net.bn1 = nn.BatchNorm2d(scaled(64, scale, "resnet18"))
    return net

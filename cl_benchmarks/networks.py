"""Networks that carry MoE layers: trunks, hidden blocks, a linear classifier."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.plasticity.probes import output_layer
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


def dense_block(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
    """The dense counterpart of an MoELayer: a two-layer ReLU MLP, [B, dim_in] -> [B, dim_out].

    For images it is that of the bank `conv`: a 3 x 3 convolution, ReLU, a 1 x 1 convolution.
    """
    if images:
        first = nn.Conv2d(dim_in, hidden, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, dim_out, 1))
    return nn.Sequential(nn.Linear(dim_in, hidden), nn.ReLU(), nn.Linear(hidden, dim_out))


class Network(nn.Module):
    """Trunk, neck, hidden blocks with a ReLU between two of them, and classifier.

    The last block feeds the classifier without a ReLU: units of a ReLU there die in the shock of a
    growth, and no growth of the block before can bring them back. With `place` "head" the last
    block is the classifier: it gives the logits itself.

    Args:
        trunk: [B, C, H, W] -> [B, F].
        config: the head's sizes.
        classes: outputs.
        make_block: makes the blocks at `config.place`; the others are dense.

    Raises:
        UserError: an empty layer, or a place that the trunk does not have.
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
        if config.trunk_hidden < 0:
            raise UserError(f"network: trunk_hidden={config.trunk_hidden} must be at least 0")
        if config.place in ("trunk", "everywhere"):
            trunk.place_block(make_block, config.trunk_hidden)
        width = config.width if config.neck else trunk.out_features
        self.trunk = trunk
        self.neck: nn.Module = nn.Identity()
        if config.neck:
            self.neck = nn.Sequential(nn.Linear(trunk.out_features, width), nn.ReLU())
        self.blocks = nn.Sequential()
        for number, make in enumerate(_makers(config, make_block)):
            if number:
                self.blocks.append(nn.ReLU())
            self.blocks.append(make(width, config.hidden, width))
        if config.place == "head":
            if len(self.blocks):
                self.blocks.append(nn.ReLU())
            self.classifier = make_block(width, config.hidden, classes)
        else:
            self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images x [B, C, H, W]."""
        return self.classifier(self.blocks(self.neck(self.trunk(x))))

    def output_layers(self) -> list[nn.Module]:
        """The one layer that gives the logits: linear, or at place "head" an MoE layer."""
        named = getattr(self.classifier, "output_layers", None)
        return [output_layer(self.classifier)] if named is None else named()


def for_images(bank: PartConfig) -> bool:
    """Whether a bank maps images rather than vectors."""
    return bank.part.channel_axis == 1  # type: ignore[attr-defined]


def check_bank(config: Trunk.Config, bank: PartConfig) -> None:
    """Refuse a bank that does not fit into the place of the MoE layers.

    Raises:
        UserError: names both, and what fits.
    """
    place, name = config.place, bank.part.name
    if place == "trunk" and not for_images(bank):
        raise UserError(
            f"--network.place trunk maps images, and --bank {name} is for vectors; use --bank conv"
        )
    if place != "trunk" and for_images(bank):
        more = "; its trunk has bank conv anyway" if place == "everywhere" else ""
        raise UserError(
            f"--network.place {place} has hidden blocks of vectors, and --bank {name} is for images"
            f"{more}; use --network.place trunk, or another --bank"
        )


def _makers(config: Trunk.Config, make_block: MakeBlock) -> list[MakeBlock]:
    """What makes each hidden block before the classifier."""
    if config.place == "head":
        return [dense_block] * (config.blocks - 1)
    moe = {"last": 1, "trunk": 0}.get(config.place, config.blocks)
    return [dense_block] * (config.blocks - moe) + [make_block] * moe


def build_network(
    config: Trunk.Config,
    shape: tuple[int, int, int],
    classes: int,
    make_block: MakeBlock = dense_block,
) -> Network:
    """A network for images of `shape` (C, H, W); draws weights from torch's global generator."""
    return Network(config.build(shape), config, classes, make_block)


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

"""Networks that carry MoE layers: a trunk, hidden blocks, a linear classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_benchmarks.trunks import MakeBlock, Trunk
from dynmoe.errors import UserError
from dynmoe.plasticity.probes import output_layer
from dynmoe.registry import PartConfig

STATISTICS = 6
"""Numbers per channel that `image_statistics` gives."""


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
        channels: C, of the images.
        make_block: makes the blocks at `config.place`; the others are dense.

    Raises:
        UserError: an empty layer, or a place that the trunk does not have.
    """

    def __init__(
        self,
        trunk: Trunk,
        config: Trunk.Config,
        classes: int,
        channels: int,
        make_block: MakeBlock = dense_block,
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
        self.norm, self.statistics = config.norm, config.statistics
        features = trunk.out_features + (STATISTICS * channels if config.statistics else 0)
        width = config.width if config.neck else features
        self.trunk = trunk
        self.neck: nn.Module = nn.Identity()
        if config.neck:
            self.neck = nn.Sequential(nn.Linear(features, width), nn.ReLU())
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
        features = self.trunk(x)
        if self.norm:
            features = F.layer_norm(features, features.shape[1:])
        if self.statistics:
            features = torch.cat([features, image_statistics(x).to(features.dtype)], dim=1)
        return self.classifier(self.blocks(self.neck(features)))

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
    """A network for images of `shape` (C, H, W); draws weights from torch's global generator.

    Raises:
        UserError: images are too small for the statistics that the network reads.
    """
    if config.statistics and min(shape[1:]) < 2:
        raise UserError(
            f"network: statistics of images need 2x2 pixels or more, and these are {shape[1]}x"
            f"{shape[2]}; leave out --network.statistics"
        )
    return Network(config.build(shape), config, classes, shape[0], make_block)


def image_statistics(x: Tensor) -> Tensor:
    """[B, 6 C] of images x [B, C, H, W], per channel, over all pixels.

    Means and standard deviations of the values, the logarithms of 1 + the mean absolute differences
    to the next pixel to the right and below, and the standard deviations of these differences.
    """
    right, below = x.diff(dim=3), x.diff(dim=2)
    steps = [d.abs().mean(dim=(2, 3)).log1p() for d in (right, below)]
    spread = [_deviation(d) for d in (x, right, below)]
    return torch.cat([x.mean(dim=(2, 3)), *steps, *spread], dim=1)


def _deviation(x: Tensor) -> Tensor:
    """[B, C] standard deviations of each channel: a tenth of the time of `Tensor.std` on a CPU."""
    return (x - x.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(2, 3)).sqrt()

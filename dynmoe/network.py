"""Networks that carry MoE layers: a feature trunk, hidden blocks, and a linear classifier.

    images [B, C, H, W] -> trunk -> [B, F] -> neck -> [B, W] -> blocks -> [B, W] -> [B, classes]

Every block maps width W to W through `hidden` units: a dense two-layer MLP or an MoELayer of the
same size. Which of the two stands where is the caller's choice, so that dense and growing networks
differ in nothing else.
"""

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

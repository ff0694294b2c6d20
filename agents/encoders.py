"""Encoders of observations."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from agents.tiles import TiledConvolution
from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig

Place = Literal["trunk", "actor", "critic"]


class Encoder(nn.Module, Part, kind="encoder"):
    """Base of all encoders: built from their `Config` and an input shape. `out_features` is F."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every network: its hidden blocks."""

        hidden: int = 256
        """hidden units of each block: the budget of its experts at the start"""
        place: tuple[Place, ...] = ("actor", "critic")
        """where the MoE layers are (dense blocks in the methods without them); trunk adds a block
        that actor and critic share"""
        actor_tail: bool = False
        """one more linear layer, as wide as the actor's outputs, behind the actor's block (as in
        the Craftax baselines)"""

    out_features: int
    reads_bytes: bool = False
    """whether images come as they are, uint8; else they are floats"""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F] of observations x [B, C, H, W] or [B, D]."""


def image_shape(encoder: str, shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    """The shape (C, H, W), checked.

    Raises:
        UserError: observations are no images, or smaller than `least` pixels a side.
    """
    if len(shape) != 3:
        raise UserError(f"encoder {encoder}: observations have shape {shape}; use --encoder mlp")
    if min(shape[1:]) < least:
        raise UserError(
            f"encoder {encoder}: frames are {shape[1]}x{shape[2]}, it needs {least}x{least} or "
            "more; use --encoder mlp"
        )
    return shape[0], shape[1], shape[2]


def orthogonal(layer: nn.Conv2d | nn.Linear, gain: float = math.sqrt(2)) -> nn.Module:
    """The layer with orthogonal weights and zero biases, as PPO implementations have them.

    Source: Engstrom et al. 2020, "Implementation Matters in Deep RL" (arXiv 2005.12729).
    """
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def check_sizes(encoder: str, least: int = 1, **sizes: int | tuple[int, ...]) -> None:
    """Refuse options, numbers or tuples of them, that hold less than `least`.

    Raises:
        UserError: names the option.
    """
    for name, value in sizes.items():
        if min(value if isinstance(value, tuple) else (value,), default=least) < least:
            raise UserError(f"encoder {encoder}: {name}={value} must be at least {least}")


def check_tile(encoder: str, tile: int, sides: list[int], given: int | None = None) -> None:
    """Refuse tiles that do not fill frames of these sides.

    Raises:
        UserError: names the option, as it was `given`.
    """
    if tile < 1 or any(side % tile for side in sides):
        raise UserError(
            f"encoder {encoder}: tile={tile if given is None else given} does not suit frames of "
            f"{sides[0]}x{sides[1]}; set --encoder.tile to a divisor of both, or take "
            "--encoder mlp"
        )


class Layered(Encoder):
    """Base of the encoders that are layers in a row, for observations of `shape`."""

    def __init__(self, layers: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers
        with torch.no_grad():
            self.out_features = layers(torch.zeros(1, *shape)).numel()

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F]."""
        return self.layers(x)


class MLP(Layered, name="mlp"):
    """Linear layers with tanh, for vector observations; images are flattened."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the MLP."""

        widths: tuple[int, ...] = (128,)
        """width of each layer"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        check_sizes("mlp", widths=config.widths)
        layers = nn.Sequential(nn.Flatten())
        for before, after in pairwise([math.prod(shape), *config.widths]):
            layers.extend([orthogonal(nn.Linear(before, after)), nn.Tanh()])
        super().__init__(layers, shape)


class Nature(Layered, name="nature", source="Mnih et al. 2015 (Nature 518)"):
    """8x8, 4x4 and 3x3 strided convolutions (Mnih et al. 2015, "NatureCNN")."""

    def __init__(self, config: Encoder.Config, shape: tuple[int, ...]) -> None:
        channels = image_shape("nature", shape, 36)[0]
        layers = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3)),
            nn.ReLU(),
            nn.Flatten(),
        )
        super().__init__(layers, shape)


class Conv(
    Layered,
    name="conv",
    source="after Matthews et al. 2024 (arXiv 2402.16801), Craftax_Baselines' ActorCriticConv",
):
    """Three 5x5 convolutions with 3x3 pooling, shaped like Craftax_Baselines' ActorCriticConv.

    F is 512 for Craftax, 128 for Craftax Classic. Pooling stands before the ReLU: the two commute,
    and a ninth of the values is left to rectify.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the convolutional network."""

        hidden: int = 512
        """hidden units of each block: the budget of its experts at the start"""
        actor_tail: bool = True
        """one more linear layer, as wide as there are actions, behind the actor's block"""
        channels: int = 32
        """channels of each convolution"""
        tile: int = 0
        """pixels of the tiles that frames are made of (Craftax 10, Classic 7): computes the first
        convolution once per distinct tile, on a CPU; 0 for from every pixel"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        check_sizes("conv", channels=config.channels)
        check_sizes("conv", least=0, tile=config.tile)
        channels, *sides = image_shape("conv", shape, 27)
        layers = nn.Sequential()
        for before, after in pairwise([channels, *[config.channels] * 3]):
            convolution = orthogonal(nn.Conv2d(before, after, 5, padding=2))
            layers.extend([convolution, nn.MaxPool2d(3), nn.ReLU()])
        if config.tile:
            check_tile("conv", config.tile, sides)
            tiled = TiledConvolution(channels, config.channels, config.tile)
            tiled.load_state_dict(layers[0].state_dict())
            layers[0], layers[1] = tiled, nn.Identity()  # it pools as well
            self.reads_bytes = True
        super().__init__(layers.append(nn.Flatten()), shape)


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
        """Add the branch to x [B, C, H, W]; the shape stays."""
        return x + self.layers(x)


class Impala(Layered, name="impala", source="Espeholt et al. 2018 (arXiv 1802.01561)"):
    """Residual blocks behind 3x3 convolutions and pooling (Espeholt et al. 2018, 1802.01561)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Options of the small IMPALA network."""

        channels: tuple[int, ...] = (16, 32, 32)
        """channels of each stage"""
        blocks: int = 1
        """residual blocks per stage; the paper's large network has 2"""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        check_sizes("impala", channels=config.channels)
        check_sizes("impala", least=0, blocks=config.blocks)
        layers = nn.Sequential()
        for before, after in pairwise([image_shape("impala", shape, 8)[0], *config.channels]):
            layers.append(orthogonal(nn.Conv2d(before, after, 3, padding=1)))
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            layers.extend(Residual(after) for _ in range(config.blocks))
        super().__init__(layers.extend([nn.ReLU(), nn.Flatten()]), shape)


class Patch(Layered, name="patch"):
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
        check_sizes("patch", channels=config.channels, mixed=config.mixed)
        channels, height, width = image_shape("patch", shape, 7)
        tile = config.tile or next((t for t in (10, 7) if not (height % t or width % t)), 0)
        check_tile("patch", tile, [height, width], config.tile)
        layers = nn.Sequential(
            orthogonal(nn.Conv2d(channels, config.channels, tile, stride=tile)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(config.channels, config.mixed, 3, padding=1)),
            nn.ReLU(),
            nn.Flatten(),
        )
        super().__init__(layers, shape)

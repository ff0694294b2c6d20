"""The kind of part that turns observations into features: `--encoder NAME`."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

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

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F] of float observations x [B, C, H, W] or [B, D]."""


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


@torch.no_grad()
def flat_features(layers: nn.Module, shape: tuple[int, ...]) -> int:
    """Outputs per sample of `layers` for observations of `shape`."""
    return layers(torch.zeros(1, *shape)).numel()


def check_sizes(encoder: str, least: int = 1, **sizes: int | tuple[int, ...]) -> None:
    """Refuse options, numbers or tuples of them, that hold less than `least`.

    Raises:
        UserError: names the option.
    """
    for name, value in sizes.items():
        if min(value if isinstance(value, tuple) else (value,), default=least) < least:
            raise UserError(f"encoder {encoder}: {name}={value} must be at least {least}")

"""The plain multilayer perceptron."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynmoe.network import Trunk


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

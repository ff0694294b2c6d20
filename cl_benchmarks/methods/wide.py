"""A wider dense network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from cl_benchmarks.method import Horizon, Method, Training
from dynmoe.errors import UserError
from dynmoe.growth.settings import GrowthSettings
from dynmoe.network import MakeBlock, dense_block
from dynmoe.registry import PartConfig


class Wide(Method, name="wide"):
    """A dense block several times as wide, from the start: does more capacity alone help?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the wide network."""

        factor: int = 4
        """hidden units, as a multiple of the other methods'"""

    def __init__(self, config: Config) -> None:
        if config.factor < 1:
            raise UserError(f"method wide: factor={config.factor} must be at least 1")
        super().__init__(config)
        self.factor = config.factor

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A dense block of `factor` times the hidden units."""

        def make(width: int, hidden: int) -> nn.Module:
            return dense_block(width, hidden * self.factor)

        return make

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []

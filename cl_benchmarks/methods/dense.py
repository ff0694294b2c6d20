"""The dense network: the reference that loses plasticity."""

from __future__ import annotations

from typing import Any

from cl_benchmarks.method import DenseMethod, Training
from dynmoe.growth.settings import GrowthSettings


class Dense(DenseMethod, name="dense"):
    """The same network with a dense block of as many hidden units; trained on without a break."""

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []

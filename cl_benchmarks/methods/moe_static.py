"""A mixture of experts that never grows."""

from __future__ import annotations

from typing import Any

from cl_benchmarks.method import ConstantMoE, Training
from dynmoe.growth.settings import GrowthSettings


class StaticMoE(ConstantMoE, name="moe-static"):
    """All experts from the start, as many as DynamicMoE ends with: is it growth that helps?"""

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """None: plain training."""
        return []

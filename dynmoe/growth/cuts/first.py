"""Keep the first units."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.growth.cut import Cut
from dynmoe.moe.bank import UnitBank


class FirstCut(Cut, name="first"):
    """Keeps each expert's first units: slicing its weight matrices."""

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Falling with the position in the pool [H]."""
        return -torch.arange(len(bank.segment), dtype=torch.float32)

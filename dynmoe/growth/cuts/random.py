"""Keep units drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.growth.cut import Cut
from dynmoe.moe.bank import UnitBank


class RandomCut(Cut, name="random"):
    """Keeps units drawn at random."""

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Uniform draws [H]."""
        return torch.rand(len(bank.segment), generator=generator)

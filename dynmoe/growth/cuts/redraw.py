"""Keep nothing: every expert starts again at its new size."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.growth.cut import Cut
from dynmoe.moe.bank import UnitBank


class RedrawCut(Cut, name="redraw"):
    """Keeps no unit of an expert that shrinks: it is drawn afresh at its new size, too."""

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """-inf [H] throughout."""
        return torch.full((len(bank.segment),), float("-inf"))

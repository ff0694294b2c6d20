"""Which units an old expert keeps when its hidden size shrinks: the cut contract."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dynmoe.moe.bank import UnitBank
from dynmoe.registry import Part, PartConfig


class Cut(Part, ABC, kind="cut"):
    """Base of all cuts. The paper leaves the rule open; every cut here is our reading of it."""

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Scores [H] of the hidden units, on the CPU; each expert keeps its highest.

        Args:
            bank: the bank about to be cut.
            mean_activation: [H] mean |activation| over a probe batch, or None without a probe.
            generator: for random rules.

        A unit scored -inf is never kept.
        """

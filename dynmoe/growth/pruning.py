"""Pruning criteria: which hidden units an expert keeps when it shrinks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import UnitBank
from dynmoe.registry import Part, PartConfig


class PruningCriterion(Part, ABC, kind="pruning"):
    """Base of all criteria. The paper leaves the rule open; every one here is our reading of it."""

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Scores [H] of the hidden units, on the CPU; each expert keeps its highest, -inf never.

        Args:
            mean_activation: [H] mean |activation| over a probe batch, or None without a probe.
        """


class FirstUnits(PruningCriterion, name="first"):
    """Keeps each expert's first units: slicing its weight matrices."""

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Falling with the position in the pool [H]."""
        return -torch.arange(len(bank.segment), dtype=torch.float32)


class RandomUnits(PruningCriterion, name="random"):
    """Keeps units drawn at random."""

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Uniform draws [H]."""
        return torch.rand(len(bank.segment), generator=generator)


class ReinitUnits(PruningCriterion, name="reinit"):
    """Keeps no unit of an expert that shrinks: it is re-initialised at its new size, too."""

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """-inf [H] throughout."""
        return torch.full((len(bank.segment),), float("-inf"))


class UtilityUnits(
    PruningCriterion,
    name="utility",
    source="Dohare et al. 2024 (Nature 632), contribution utility; over one batch, ours",
):
    """Keeps the units of largest contribution utility, mean |h| * sum |w_out|.

    The mean is over one probe batch instead of a running one.
    """

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Contribution utility [H]; needs a probe batch.

        Raises:
            UserError: there is no probe batch.
        """
        if mean_activation is None:
            raise UserError(
                "pruning by utility needs a probe batch: pass probe= to the growth step"
            )
        outgoing = bank.output_weight().detach().abs().transpose(0, 1).flatten(1).sum(dim=1)
        return (mean_activation * outgoing).cpu()

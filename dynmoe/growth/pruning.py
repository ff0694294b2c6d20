"""How many hidden units each expert has after a growth, and which it keeps when it shrinks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import UnitBank
from dynmoe.moe.bank import spread_sizes
from dynmoe.registry import Part, PartConfig


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What growth may spend, in hidden units of one layer."""

    mode: Literal["constant", "per-growth"] = "constant"
    """constant: the pool keeps its size and is divided again (DynamicMoE's continual learning);
    per-growth: each new expert brings units of its own (its reinforcement learning)"""
    units: int = 0
    """per-growth: hidden units of each new expert; 0 for as many as the first expert has"""

    def __post_init__(self) -> None:
        if self.units < 0:
            raise UserError(f"budget: units={self.units} must be at least 0")

    def sizes_after(self, sizes: list[int], new: int, spread: float = 1.0) -> list[int]:
        """Hidden sizes [E + new] after adding `new` experts to experts of the given sizes [E].

        A constant budget shares the units out with that `spread` (see `spread_sizes`).

        Raises:
            UserError: an expert would be left without units.
        """
        if self.mode == "per-growth":
            return sizes + [self.units or sizes[0]] * new
        total, experts = sum(sizes), len(sizes) + new
        if total < experts:
            raise UserError(
                f"growing to {experts} experts would leave some without hidden units: the constant "
                f"budget holds {total}; use a smaller granularity, fewer growths or more units"
            )
        return spread_sizes(total, experts, spread)


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
        """Contribution utility [H]; needs a probe batch."""
        if mean_activation is None:
            raise UserError(
                "pruning by utility needs a probe batch: pass probe= to the growth step"
            )
        outgoing = bank.output_weight().detach().abs().transpose(0, 1).flatten(1).sum(dim=1)
        return (mean_activation * outgoing).cpu()

"""How many hidden units each expert has after a growth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynmoe.errors import UserError
from dynmoe.moe.bank import spread_sizes
from dynmoe.ranges import check_options


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What growth may spend, in hidden units of one layer."""

    mode: Literal["constant", "per-growth"] = "constant"
    """constant: the pool keeps its size and is divided again (DynamicMoE's continual learning);
    per-growth: each new expert brings units of its own (its reinforcement learning)"""
    units: int = 0
    """per-growth: hidden units of each new expert; 0 for as many as the first expert has"""
    start: Literal["whole", "share"] = "whole"
    """per-growth: hidden units at the start. whole: those of a dense block; share: so few that the
    layer ends with those of a dense block, and all experts have equally many"""

    def __post_init__(self) -> None:
        if self.units < 0:
            raise UserError(f"budget: units={self.units} must be at least 0")
        check_options("budget", self)
        if self.start == "share" and self.units:
            raise UserError(
                f"budget: units={self.units} contradicts start=share, which gives every expert the "
                "same part of a dense block's units; leave one out"
            )

    def first_hidden(self, hidden: int, experts: int, most: int) -> int:
        """Hidden units at the start of a layer that begins with `experts` and ends with `most`.

        Args:
            hidden: those of a dense block.
        """
        return hidden if self.start == "whole" else max(hidden // most, 1) * experts

    def sizes_after(self, sizes: list[int], new: int, spread: float = 1.0) -> list[int]:
        """Hidden sizes [E + new] after adding `new` experts to experts of the given sizes [E].

        A constant budget divides the units with that `spread` (see `spread_sizes`).

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

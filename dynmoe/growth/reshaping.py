"""Growth of bottlenecked experts: all their widths are rescaled, and their vector is rewritten.

Kept units keep the weights between them, with the optimizer's state of these; everything else is
fresh. At a constant budget the Parameter stays the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.budget import Budget
from dynmoe.growth.optimizer_state import entry_state, neutral_state
from dynmoe.moe.experts.bottleneck import BottleneckBank, Maps
from dynmoe.moe.widths import Widths, fit_widths

if TYPE_CHECKING:
    from dynmoe.growth.pruning import PruningCriterion
    from dynmoe.moe import UnitBank

FRESH = -1
"""Source of an entry that is drawn."""


@dataclass(frozen=True)
class Reshaping:
    """Where each entry of a bank's vector comes from."""

    sizes: list[Widths]
    """[E + n] widths after growth"""
    source: Tensor
    """[P'] int64, the old entry that each entry takes over, or FRESH, as entries not in use are"""

    @cached_property
    def fresh(self) -> Tensor:
        """[m] the entries to be drawn."""
        return (self.source == FRESH).nonzero().flatten()


@dataclass(frozen=True)
class _Units:
    """All hidden units of a bank, as pruning criteria see a pool: H1 + B + H2 of them."""

    bank: BottleneckBank

    @property
    def segment(self) -> Tensor:
        layers = zip(*self.bank.sizes, strict=True)
        owner = torch.arange(len(self.bank.sizes))
        return torch.cat([owner.repeat_interleave(torch.tensor(layer)) for layer in layers])

    def output_weight(self) -> Tensor:
        """[1, H1 + B + H2] what reads each unit."""
        return self.bank.outgoing().unsqueeze(0)


def plan_reshaping(
    bank: BottleneckBank,
    budget: Budget,
    new: int,
    pruning: PruningCriterion,
    mean_activation: Tensor | None,
    generator: torch.Generator | None,
) -> Reshaping:
    """Decide the widths after `new` experts more, and which units the old ones keep.

    An expert keeps the units of highest score in each of its layers, as many as the layer is to
    have; one that gets narrower nowhere keeps all.

    Args:
        mean_activation: [H1 + B + H2] of all units on a probe, or None without one.

    Raises:
        UserError: the budget is too small for that many experts.
    """
    old = bank.sizes
    if budget.mode == "per-growth":
        units = budget.units * bank.unit_cost if budget.units else bank.shape.cost(old[0])
        one = fit_widths(bank.shape, units, 1)
        sizes = [*old, *one * new] if one else []
    else:
        sizes = fit_widths(bank.shape, len(bank.weights), len(old) + new)
    if not sizes:
        raise UserError(
            f"growing to {len(old) + new} experts would leave some without hidden units: the "
            f"budget holds {len(bank.weights)} parameters, and an expert of one unit in each layer "
            f"has {bank.shape.cost((1, 1, 1))}; use a smaller granularity, fewer growths or more "
            "units"
        )
    scores = pruning.scores(cast("UnitBank", _Units(bank)), mean_activation, generator)
    kept = _kept_units(old, sizes, scores)
    length = bank.shape.total(sizes)
    if budget.mode == "constant":
        length = len(bank.weights)
    source = torch.full((length,), FRESH)
    dims = bank.shape.dim_in, bank.shape.dim_out
    before = Maps.of(torch.arange(len(bank.weights)), old, *dims).by_expert()
    after = Maps.of(source, sizes, *dims).by_expert()
    for own, theirs, ours in zip(kept, before, after, strict=False):
        _take_over(own, theirs, ours)
    return Reshaping(sizes, source)


def _kept_units(old: list[Widths], sizes: list[Widths], scores: Tensor) -> list[list[Tensor]]:
    """[E] of 3 index tensors: the old units that each layer of each old expert keeps, in order."""
    layers = scores.split([w for layer in zip(*old, strict=True) for w in layer])
    kept = []
    for expert, (before, after) in enumerate(zip(old, sizes, strict=False)):
        shrinks = any(b > a for b, a in zip(before, after, strict=True))
        chosen = []
        for layer, width in enumerate(after):
            own = layers[layer * len(old) + expert]
            units = torch.arange(len(own))
            if shrinks:
                units = own.argsort(descending=True, stable=True)[:width]
                units = units[own[units] > float("-inf")].sort().values
            chosen.append(units)
        kept.append(chosen)
    return kept


def _take_over(kept: list[Tensor], theirs: list[Tensor], ours: list[Tensor]) -> None:
    """Write the old places of an expert's kept weights into its new maps.

    Args:
        kept: old units of its three layers that stay, the first ones in the new order.
        theirs, ours: its maps before and after (see `Maps.by_expert`), of places.
    """
    first, middle, last = kept
    every_in, every_out = torch.arange(theirs[0].shape[1]), torch.arange(theirs[6].shape[1])
    ends = [(first, every_in), (first,), (middle, first), (middle,), (last, middle), (last,),
            (last, every_out)]  # fmt: skip
    for new, before, axes in zip(ours, theirs, ends, strict=True):
        for axis, units in enumerate(axes):
            before = before.index_select(axis, units)
            new = new.narrow(axis, 0, len(units))
        new.copy_(before)


@dataclass(frozen=True)
class Moved:
    """A vector whose entries have moved; what goes with them is still to follow."""

    parameter: nn.Parameter
    reshaping: Reshaping
    second: dict[str, Tensor]
    """second moments of fresh entries, see `mean_moments`"""

    @torch.no_grad()
    def carry_out(self, optimizer: Optimizer | None) -> None:
        """Move pending gradient and optimizer state along, and restart those of fresh entries."""
        source, fresh = self.reshaping.source, self.reshaping.fresh
        if self.parameter.grad is not None:
            follow(self.parameter.grad, source)
            self.parameter.grad.index_fill_(0, fresh.to(self.parameter.device), 0.0)
        if optimizer is not None:
            for _, value, _ in entry_state(optimizer, self.parameter, 0):
                follow(value, source)
        neutral_state(optimizer, self.parameter, 0, fresh, self.second)


@torch.no_grad()
def follow(values: Tensor, source: Tensor) -> None:
    """Let values [P] follow their entries; those of fresh entries mean nothing."""
    values.copy_(values.index_select(0, source.clamp(min=0).to(values.device)))


@torch.no_grad()
def reshape(
    bank: BottleneckBank, reshaping: Reshaping, new: Tensor, generator: torch.Generator | None
) -> None:
    """Give a bank, whose vector has its new length, its new widths, and old experts their weights.

    Args:
        new: [n] the new experts, whose weights are still to be drawn.
    """
    follow(bank.weights, reshaping.source)
    bank.set_widths(reshaping.sizes)
    [*_, (_, _, theirs)] = bank.entries(new)
    bank.draw_weights(reshaping.fresh[~torch.isin(reshaping.fresh, theirs.cpu())], generator)

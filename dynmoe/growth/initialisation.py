"""How new experts start: the plan of a growth, and the rules that make one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.growth.reshaping import Reshaping
from dynmoe.registry import Part, PartConfig

FRESH = -1
"""Source of a unit, or parent of an expert, that is re-initialised."""


@dataclass(frozen=True)
class Request:
    """What a growth asks of an init."""

    segment: Tensor
    """[H] int64, the expert that owns each unit now, on the CPU; empty for banks without units"""
    experts: int
    """E, experts now"""
    target: list[int]
    """[E + n] hidden sizes that the budget asks for"""
    scores: Tensor
    """[H] the pruning criterion's scores; experts keep their highest, and nothing scored -inf"""
    scale: float
    """gate scale before growth / after it: E / (E + n) where gates are scaled by E, else 1"""
    generator: torch.Generator | None

    @property
    def sizes(self) -> list[int]:
        """[E] hidden sizes now."""
        return torch.bincount(self.segment, minlength=self.experts).tolist()

    @property
    def owned(self) -> list[Tensor]:
        """[E] the units of each expert, in order."""
        return list(self.segment.argsort(stable=True).split(self.sizes))

    @property
    def new(self) -> int:
        """How many experts are added."""
        return len(self.target) - self.experts


@dataclass
class Plan:
    """Where each unit and expert of the grown layer comes from; factors and shifts in float64."""

    sizes: list[int]
    """[E + n] hidden sizes after growth"""
    source: Tensor
    """[H'] the old unit that each unit takes over, or FRESH"""
    factor: Tensor
    """[H'] multiplies the output weights of units taken over; 0 silences a fresh one"""
    parents: list[int]
    """[n] the old expert whose router row each new expert copies, or FRESH"""
    bias_factor: Tensor
    """[E + n] multiplies each expert's output bias; new experts copy their parent's bias first"""
    logit_shift: Tensor
    """[E + n] added to the router's logit shift; new experts copy their parent's shift first"""
    reinit_router: bool = False
    """re-initialise the router rows of the old experts, too"""
    reshaping: Reshaping | None = None
    """what becomes of a bank of bottlenecked experts; sizes, source and factor are then empty"""

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the units of the plan go in the pool, so that units taken over need not move.

        Returns:
            place [H'], the position of each unit of the plan; stays [H'] bool, which of them are
            old units at their old position. The others fill the free positions, in order.
        """
        order = self.source.argsort(stable=True)
        ranked = self.source[order]
        again = torch.zeros_like(ranked, dtype=torch.bool)
        again[1:] = ranked[1:] == ranked[:-1]
        stays = torch.empty_like(again)
        stays[order] = ~again & (ranked != FRESH)
        free = torch.ones_like(stays)
        free[self.source[stays]] = False
        place = torch.empty_like(self.source)
        place[stays] = self.source[stays]
        place[~stays] = free.nonzero().flatten()
        return place, stays


class Init(Part, ABC, kind="init"):
    """Base of all inits."""

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def plan(self, request: Request) -> Plan:
        """Decide where the grown layer's units and experts come from."""


def cut_plan(request: Request) -> Plan:
    """Every old expert keeps its best units up to its target size; everything else is fresh.

    An expert that does not shrink keeps all of them, whatever the criterion says.
    """
    segment, target = request.segment, torch.tensor(request.target)
    sizes = torch.bincount(segment, minlength=len(target))
    ranked = request.scores.argsort(descending=True, stable=True)
    ranked = ranked[segment[ranked].argsort(stable=True)]  # by expert, its best units first
    owner = segment[ranked]
    rank = torch.arange(len(ranked)) - (sizes.cumsum(0) - sizes)[owner]
    best = (rank < target[owner]) & (request.scores[ranked] > float("-inf"))
    kept = ranked[best | (sizes <= target)[owner]].sort().values
    kept = kept[segment[kept].argsort(stable=True)]
    owner = segment[kept]
    count = torch.bincount(owner, minlength=len(target))
    source = torch.full((sum(request.target),), FRESH)
    begin = (target.cumsum(0) - target) - (count.cumsum(0) - count)
    source[begin[owner] + torch.arange(len(kept))] = kept
    experts = len(request.target)
    return Plan(
        sizes=list(request.target),
        source=source,
        factor=torch.ones(sum(request.target), dtype=torch.float64),
        parents=[FRESH] * request.new,
        bias_factor=torch.ones(experts, dtype=torch.float64),
        logit_shift=torch.zeros(experts, dtype=torch.float64),
    )


def choose_parents(sizes: list[int], new: int) -> list[int]:
    """[n] parents for new experts: the largest experts first, each once before any twice."""
    ranked = sorted(range(len(sizes)), key=lambda e: (-sizes[e], e))
    return [ranked[i % len(ranked)] for i in range(new)]


def share_gates(plan: Plan, parents: list[int]) -> None:
    """Let each new expert take an equal part of its parent's gate.

    Parent and children get the parent's router row and logits shifted by -log(family size), which
    leaves every other expert's softmax gate as it was (Net2Net's idea, Chen et al. 2016
    (arXiv 1511.05641), moved from units to gates).
    """
    plan.parents = list(parents)
    first_new = len(plan.sizes) - len(parents)
    for parent, children in Counter(parents).items():
        shift = -math.log(children + 1)
        plan.logit_shift[parent] = shift
        for child, its_parent in enumerate(parents):
            if its_parent == parent:
                plan.logit_shift[first_new + child] = shift


class RandomInit(Init, name="random", source="Kim 2025 (arXiv 2511.18987)"):
    """New experts and their router rows are re-initialised (DynamicMoE, arXiv 2511.18987).

    The function is not preserved, by choice of the paper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the random init."""

        router: Literal["new", "all"] = "all"
        """which router rows are drawn: the new experts' (the paper), or every expert's, which lets
        a router that has settled share its samples out again"""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.reinit_router = config.router == "all"

    def plan(self, request: Request) -> Plan:
        """Prune the old experts to size, draw the rest."""
        plan = cut_plan(request)
        plan.reinit_router = self.reinit_router
        return plan


class ZeroOutputInit(Init, name="zero-output"):
    """Fresh input weights, zero output weights; takes part of a parent's gate.

    The parent's output is scaled up by what its gate loses, so adding the expert leaves the
    layer's function unchanged for dense softmax gates. What the constant budget cuts from old
    experts is a change of its own, shown by the growth shock.
    """

    def plan(self, request: Request) -> Plan:
        """Prune as the budget asks; parents share their gates with silent children."""
        plan = cut_plan(request)
        parents = choose_parents(request.sizes, request.new)
        share_gates(plan, parents)
        children = Counter(parents)
        experts = len(request.sizes)
        for expert, (units, factor) in enumerate(
            zip(plan.source.split(plan.sizes), plan.factor.split(plan.sizes), strict=True)
        ):
            loss = (1 + children[expert]) * request.scale
            kept = units != FRESH
            factor[kept] = loss
            plan.bias_factor[expert] = loss
            if expert >= experts:
                factor[:] = 0.0
                plan.bias_factor[expert] = 0.0
        return plan


class DuplicateInit(
    Init, name="duplicate", source="after Chen et al. 2016 (arXiv 1511.05641), Net2Wider"
):
    """Splits or copies a parent expert, router row included; the function stays the same.

    With a constant budget a parent's units are dealt out between it and its children. Nothing is
    cut, so the sizes that the budget asks for give way: children have half of their parent's
    units. With a per-growth budget children copy the parent's units; each unit's output weight is
    shared between the copies in random parts, which breaks the symmetry that equal copies could
    never leave. After Net2Wider (Chen et al. 2016, arXiv 1511.05641), with the experts' gates
    divided by logit shifts of -log(family size).

    Raises:
        UserError: when planned for a bank without hidden units, whose copies would stay equal.
    """

    def plan(self, request: Request) -> Plan:
        """Deal or copy, whichever the budget allows.

        Raises:
            UserError: the bank has no hidden units.
        """
        if not len(request.segment):
            raise UserError(
                "init duplicate needs a bank with hidden units: whole copies of an expert under "
                "equal gates could never become different; use init zero-output or random"
            )
        parents = choose_parents(request.sizes, request.new)
        owned = request.owned
        if sum(request.target) == sum(request.sizes):
            units, shares = _deal(owned, parents, request.scores)
        else:
            units, shares = _copy(owned, parents, request)
        experts = len(request.target)
        children = Counter(parents)
        family = [1 + children[e] for e in [*range(len(request.sizes)), *parents]]
        plan = Plan(
            sizes=[len(u) for u in units],
            source=torch.cat(units),
            factor=torch.cat([s * f * request.scale for s, f in zip(shares, family, strict=True)]),
            parents=[],
            bias_factor=torch.full((experts,), request.scale, dtype=torch.float64),
            logit_shift=torch.zeros(experts, dtype=torch.float64),
        )
        share_gates(plan, parents)
        return plan


def _deal(
    owned: list[Tensor], parents: list[int], scores: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Deal each parent's units, best first, in turn to its family. Returns units and shares."""
    units = list(owned) + [torch.empty(0, dtype=torch.long) for _ in parents]
    for parent in sorted(set(parents)):
        family = [parent] + [len(owned) + c for c, p in enumerate(parents) if p == parent]
        if len(owned[parent]) < len(family):
            raise UserError(
                f"expert {parent} has {len(owned[parent])} hidden units and cannot share them with "
                f"{len(family) - 1} new experts; use a smaller granularity or more units"
            )
        ranked = owned[parent][scores[owned[parent]].argsort(descending=True, stable=True)]
        for turn, member in enumerate(family):
            units[member] = ranked[turn :: len(family)].sort().values
    return units, [torch.ones(len(u), dtype=torch.float64) for u in units]


def _copy(
    owned: list[Tensor], parents: list[int], request: Request
) -> tuple[list[Tensor], list[Tensor]]:
    """Copy each parent's units to its children. Returns units and random shares of the output.

    A child with room for more units than its parent has gets silent fresh ones (share 0); one with
    room for fewer copies the first and leaves the rest to the others.
    """

    def draw(size: int) -> Tensor:
        return torch.rand(size, generator=request.generator, dtype=torch.float64)

    units, weights = list(owned), [draw(len(u)) for u in owned]
    for child, parent in enumerate(parents):
        size = request.target[len(owned) + child]
        copied = owned[parent][:size]
        units.append(torch.cat([copied, copied.new_full((size - len(copied),), FRESH)]))
        weights.append(draw(size) * (units[-1] != FRESH))
    total = torch.zeros(sum(request.sizes), dtype=torch.float64)
    for unit, weight in zip(units, weights, strict=True):
        weight += 0.5 * (unit != FRESH)  # keeps every share well away from 0
        total.index_add_(0, unit[unit != FRESH], weight[unit != FRESH])
    return units, [w / total[u.clamp(min=0)] for u, w in zip(units, weights, strict=True)]

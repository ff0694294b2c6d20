"""How new experts start: the init contract and the `Plan` that surgery carries out.

Shapes: E experts before, n new ones, H hidden units before and H' after.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dynmoe.registry import Part, PartConfig

FRESH = -1
"""Source of a unit, or parent of an expert, that is drawn anew."""


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
    """[H] the cut's scores; experts keep their highest, and nothing scored -inf"""
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
    redraw_router: bool = False
    """draw the router rows of the old experts afresh, too"""

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

    An expert that does not shrink keeps all of them, whatever the cut says.
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

"""New experts made from an old one, preserving the function exactly."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.growth.init import FRESH, Init, Plan, Request, choose_parents, share_gates


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
        """Deal or copy, whichever the budget allows."""
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
    """Deal each parent's units, best first, in turn to its family. Returns units and shares.

    Raises:
        UserError: a parent has fewer units than the experts that would share them.
    """
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

"""The only code that rewrites a layer's parameters and their optimizer state.

At a constant budget everything happens in place: no Parameter is replaced and no unit that is kept
moves, so optimizers, data parallel wrappers and compiled graphs stay valid, and the cost is that of
the rows handed to new experts. Only a pool that gains units gets new Parameters, which take the old
ones' place in the module and in the optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.init import FRESH, Plan
from dynmoe.growth.optimizer_state import (
    Moments,
    mean_moments,
    neutral_state,
    pad,
    replace_parameter,
)
from dynmoe.moe.bank import UnitBank, set_entries
from dynmoe.moe.layer import MoELayer

Entries = tuple[nn.Parameter, int, Tensor]
"""A parameter, an axis of it, and the index [n] of some of its entries along that axis."""


@torch.no_grad()
def grow_layer(
    layer: MoELayer,
    plan: Plan,
    birth: int,
    generator: torch.Generator,
    optimizer: Optimizer | None = None,
    moments: Moments = "mean",
) -> None:
    """Carry out a plan on one layer.

    Units that are taken over keep their weights (output weights times the plan's factor) and their
    optimizer state; fresh ones, and second copies of a unit, restart theirs (see `neutral_state`).

    Args:
        layer: the layer to grow.
        plan: where each unit and expert comes from.
        birth: growth count, noted as the new experts' birth.
        generator: draws the fresh weights.
        optimizer: its state follows the parameters; may have no state yet.
        moments: second moments of fresh entries, see `mean_moments`.

    Raises:
        UserError: the layer cannot hold that many experts.
    """
    check_room(layer, len(plan.sizes))
    new = torch.arange(len(plan.sizes) - len(plan.parents), len(plan.sizes))
    new = new.to(layer.birth.device)
    layer.birth[new] = birth
    if isinstance(layer.bank, UnitBank):
        _place_units(layer.bank, plan, generator, optimizer, moments)
    if not bool(layer.router.alive[new].any()):  # else a layer that shares the router was first
        _place_routes(layer, plan, new, generator, optimizer, moments)
    _place_experts(layer, plan, new, generator, optimizer, moments)


def check_room(layer: MoELayer, experts: int) -> None:
    """Refuse more experts than the layer was made for.

    Raises:
        UserError: the layer cannot hold that many experts.
    """
    if experts > layer.max_experts:
        raise UserError(
            f"cannot grow to {experts} experts: the layer was made for at most "
            f"{layer.max_experts} (max_experts)"
        )


def _place_units(
    bank: UnitBank,
    plan: Plan,
    generator: torch.Generator,
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    """Hand units over where they stand, and copy or draw the others into what is left free."""
    restarted = new_units(bank, plan)
    means = [mean_moments(optimizer, p, moments) if len(i) else {} for p, _, i in restarted]
    place, stays = _places(plan.source)
    append_units(bank, len(plan.source) - len(bank.segment), optimizer)
    copied = ~stays & (plan.source != FRESH)
    owner = torch.arange(len(plan.sizes)).repeat_interleave(torch.tensor(plan.sizes))
    segment = torch.empty_like(owner)
    segment[place] = owner
    bank.segment.copy_(segment)
    if bool(copied.any()):
        parents = plan.source[copied].to(bank.segment.device)
        for name, axis in bank.unit_axes():
            parameter = getattr(bank, name)
            set_entries(parameter, axis, place[copied], parameter.index_select(axis, parents))
    bank.draw_units(place[plan.source == FRESH].to(bank.segment.device), generator)
    if not bool((plan.factor == 1).all()):
        weight = bank.output_weight()
        factor = torch.empty(weight.shape[1], dtype=plan.factor.dtype)
        factor[place] = plan.factor
        weight.mul_(factor.to(weight).view(-1, *[1] * (weight.dim() - 2)))
    for (name, axis), mean in zip(bank.unit_axes(), means, strict=True):
        restart((getattr(bank, name), axis, place[~stays]), optimizer, mean)


def new_units(bank: UnitBank, plan: Plan) -> list[Entries]:
    """The entries of the units that a plan draws or copies, in each parameter of a bank."""
    place, stays = _places(plan.source)
    return [(getattr(bank, name), axis, place[~stays]) for name, axis in bank.unit_axes()]


def restart(entries: Entries, optimizer: Optimizer | None, second: dict[str, Tensor]) -> None:
    """Zero the pending gradient of entries that hold new weights, and restart their state."""
    parameter, axis, index = entries
    if parameter.grad is not None and len(index):
        if parameter.grad.layout == torch.strided:
            set_entries(parameter.grad, axis, index, parameter.grad.new_zeros(()))
        else:
            dense = parameter.grad.to_dense()
            set_entries(dense, axis, index, dense.new_zeros(()))
            parameter.grad = dense.to_sparse(parameter.grad.sparse_dim())
    neutral_state(optimizer, parameter, axis, index, second)


def _places(source: Tensor) -> tuple[Tensor, Tensor]:
    """Where the units of a plan go in the pool, so that units taken over need not move.

    Returns:
        place [H'], the position of each unit of the plan; stays [H'] bool, which of them are old
        units at their old position. The others fill the free positions, in order.
    """
    order = source.argsort(stable=True)
    ranked = source[order]
    again = torch.zeros_like(ranked, dtype=torch.bool)
    again[1:] = ranked[1:] == ranked[:-1]
    stays = torch.empty_like(again)
    stays[order] = ~again & (ranked != FRESH)
    free = torch.ones_like(stays)
    free[source[stays]] = False
    place = torch.empty_like(source)
    place[stays] = source[stays]
    place[~stays] = free.nonzero().flatten()
    return place, stays


def _place_routes(
    layer: MoELayer,
    plan: Plan,
    new: Tensor,
    generator: torch.Generator,
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    """Let the new experts live, with router rows of their own."""
    router, experts = layer.router, len(plan.sizes)
    redrawn = torch.arange(experts, device=new.device) if plan.redraw_router else new
    means = [mean_moments(optimizer, r, moments, experts - len(new)) for r in router.expert_rows()]
    router.alive[new] = True
    router.draw_rows(redrawn, generator)
    _copy_parents(router.expert_rows(), plan, new)
    for expert, parent in zip(new.tolist(), plan.parents, strict=True):
        if parent != FRESH:
            router.logit_shift[expert] = router.logit_shift[parent]
    router.logit_shift[:experts] += plan.logit_shift.to(router.logit_shift)
    for rows, mean in zip(router.expert_rows(), means, strict=True):
        restart((rows, 0, redrawn), optimizer, mean)


def _place_experts(
    layer: MoELayer,
    plan: Plan,
    new: Tensor,
    generator: torch.Generator,
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    """Give the new experts their rows in the bank."""
    bank, experts = layer.bank, len(plan.sizes)
    bank.draw_experts(new, generator)
    _copy_parents(bank.expert_rows(), plan, new)
    for rows in bank.output_rows():
        rows[:experts] *= plan.bias_factor.to(rows).view(-1, *[1] * (rows.dim() - 1))
    for rows in bank.expert_rows():
        mean = mean_moments(optimizer, rows, moments, experts - len(new))
        restart((rows, 0, new), optimizer, mean)


def _copy_parents(tensors: list[nn.Parameter], plan: Plan, new: Tensor) -> None:
    """Copy the rows of the new experts' parents to them."""
    for expert, parent in zip(new.tolist(), plan.parents, strict=True):
        for rows in tensors:
            if parent != FRESH:
                rows[expert] = rows[parent]


def append_units(bank: UnitBank, count: int, optimizer: Optimizer | None) -> None:
    """Add `count` zero units at the end of a bank's pool, with zero optimizer state.

    The one case in which new Parameters take the old ones' place, in the bank and the optimizer.
    """
    if count <= 0:
        return
    for name, axis in bank.unit_axes():
        append_entries(bank, name, axis, count, optimizer)
    bank.segment = pad(bank.segment, 0, count)


def append_entries(
    module: nn.Module, name: str, axis: int, count: int, optimizer: Optimizer | None
) -> None:
    """Give a parameter `count` zero entries more along `axis`, with zero optimizer state.

    A new Parameter takes the old one's place, in the module and the optimizer, and has its pending
    gradient with zeros for the new entries.
    """
    old: nn.Parameter = getattr(module, name)
    new = nn.Parameter(pad(old.detach(), axis, count), requires_grad=old.requires_grad)
    if old.grad is not None:
        dense = old.grad if old.grad.layout == torch.strided else old.grad.to_dense()
        grad = pad(dense, axis, count)
        strided = old.grad.layout == torch.strided
        new.grad = grad if strided else grad.to_sparse(old.grad.sparse_dim())
    setattr(module, name, new)
    if optimizer is not None:
        replace_parameter(optimizer, old, new, axis)

"""The only code that rewrites a layer's parameters and their optimizer state.

At a constant budget everything happens in place: no Parameter is replaced and no unit that is kept
moves, so optimizers, data parallel wrappers and compiled graphs stay valid, and the cost is that of
the rows handed to new experts. Only a pool that gains units gets new Parameters, which take the old
ones' place in the module and in the optimizer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.init import FRESH, Plan
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.layer import MoELayer, moe_layers

Moments = Literal["mean", "zero"]
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


@torch.no_grad()
def grow_layer(
    layer: MoELayer,
    plan: Plan,
    birth: int,
    generator: torch.Generator | None,
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
    layer.birth[new] = birth
    if isinstance(layer.bank, UnitBank):
        _place_units(layer.bank, plan, generator, optimizer, moments)
    new = new.to(layer.birth.device)
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
    generator: torch.Generator | None,
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    """Hand units over where they stand, and copy or draw the others into what is left free."""
    device = bank.segment.device
    means = {
        name: mean_moments(optimizer, getattr(bank, name), moments) for name, _ in bank.unit_axes()
    }
    source, (place, stays) = plan.source.to(device), _places(plan.source)
    place, stays = place.to(device), stays.to(device)
    append_units(bank, len(source) - len(bank.segment), optimizer)
    copied = ~stays & (source != FRESH)
    for name, axis in bank.unit_axes():
        parameter = getattr(bank, name)
        parameter.index_copy_(axis, place[copied], parameter.index_select(axis, source[copied]))
        neutral_state(optimizer, parameter, axis, place[~stays], means[name])
    owner = torch.arange(len(plan.sizes)).repeat_interleave(torch.tensor(plan.sizes))
    bank.segment[place] = owner.to(device)
    bank.draw_units(place[source == FRESH], generator)
    if not bool((plan.factor == 1).all()):
        weight = bank.output_weight()
        factor = weight.new_empty(weight.shape[1])
        factor[place] = plan.factor.to(factor)
        weight.mul_(factor.view(-1, *[1] * (weight.dim() - 2)))


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
    generator: torch.Generator | None,
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
        neutral_state(optimizer, rows, 0, redrawn, mean)


def _place_experts(
    layer: MoELayer,
    plan: Plan,
    new: Tensor,
    generator: torch.Generator | None,
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
        neutral_state(optimizer, rows, 0, new, mean)


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
    bank.segment = _padded(bank.segment, 0, count)


def append_entries(
    module: nn.Module, name: str, axis: int, count: int, optimizer: Optimizer | None
) -> None:
    """Give a parameter `count` zero entries more along `axis`, with zero optimizer state.

    A new Parameter takes the old one's place, in the module and the optimizer.
    """
    old: nn.Parameter = getattr(module, name)
    new = nn.Parameter(_padded(old.detach(), axis, count), requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is not None:
        _replace_parameter(optimizer, old, new, axis, count)


def mean_moments(
    optimizer: Optimizer | None, parameter: Tensor, moments: Moments, rows: int | None = None
) -> dict[str, float]:
    """The second moments that fresh entries start with, by state key; none of them for "zero".

    With 0 under an old step count, Adam's bias correction has long faded, and the first update is
    (1 - b1) / sqrt(1 - b2) = 3.2 learning rates whatever the gradient; the mean over the entries in
    use before the growth (the first `rows`) gives fresh ones the step size of their neighbours.
    """
    if optimizer is None or moments == "zero":
        return {}
    state = optimizer.state.get(parameter, {})
    return {key: float(state[key][:rows].mean()) for key in SECOND_MOMENTS if key in state}


def neutral_state(
    optimizer: Optimizer | None,
    parameter: Tensor,
    axis: int,
    index: Tensor,
    second: dict[str, float],
) -> None:
    """Restart the optimizer state of the entries `index` along `axis`.

    First moments (Adam's exp_avg, SGD's momentum) become 0, second moments what `second` says (see
    `mean_moments`), or 0.
    """
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.index_fill_(axis, index, second.get(key, 0.0))


@torch.no_grad()
def match_shapes(
    model: nn.Module, state: dict[str, Tensor], optimizer: Optimizer | None = None
) -> None:
    """Grow the pools of a fresh model to those of a saved `state_dict`, before it is loaded.

    Values are not restored here, only shapes; `load_state_dict` does the rest.
    """
    for name, layer in moe_layers(model):
        if not isinstance(layer.bank, UnitBank):
            continue
        saved = len(state[f"{name}.bank.segment"])
        append_units(layer.bank, saved - len(layer.bank.segment), optimizer)


def _padded(tensor: Tensor, axis: int, count: int) -> Tensor:
    """The tensor with `count` zero entries more along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _replace_parameter(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int, count: int
) -> None:
    """Put `new` where `old` stands in the optimizer, its state padded by `count` along `axis`."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = _padded(value, axis, count)
    optimizer.state[new] = state

"""The only code that rewrites a layer's parameters and their optimizer state.

At a constant budget everything happens in place: no Parameter is replaced, so optimizers, data
parallel wrappers and compiled graphs stay valid. Only a pool that gains units gets new Parameters,
which take the old ones' place in the module and in the optimizer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.init import FRESH, Plan
from dynmoe.moe.layer import MoELayer, moe_layers

Moments = Literal["mean", "zero"]
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


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
    new = torch.arange(layer.num_experts, len(plan.sizes))
    layer.router.alive[new] = True
    layer.birth[new] = birth
    _place_units(layer, plan, generator, optimizer, moments)
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
    layer: MoELayer,
    plan: Plan,
    generator: torch.Generator,
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    """Gather, draw and scale the hidden units, and re-partition the pool."""
    bank, device = layer.bank, layer.bank.segment.device
    fresh = plan.source == FRESH
    means = {
        name: mean_moments(optimizer, getattr(bank, name), moments) for name, _ in bank.unit_axes()
    }
    resize_units(bank, plan.source.clamp(min=0).to(device), optimizer)
    bank.set_hidden_sizes(plan.sizes)
    bank.draw_units(fresh.nonzero().flatten().to(device), generator)
    weight = bank.output_weight()
    weight.mul_(plan.factor.to(weight))
    restart = (fresh | _repeats(plan.source)).nonzero().flatten().to(device)
    for name, axis in bank.unit_axes():
        neutral_state(optimizer, getattr(bank, name), axis, restart, means[name])


def _place_experts(
    layer: MoELayer,
    plan: Plan,
    new: Tensor,
    generator: torch.Generator,
    optimizer: Optimizer | None,
    moments: Moments,
) -> None:
    """Give the new experts their router rows and output biases."""
    router, experts = layer.router, len(plan.sizes)
    old = experts - len(new)
    new = new.to(layer.birth.device)
    redrawn = torch.arange(experts, device=new.device) if plan.redraw_router else new
    router.draw_rows(redrawn, generator)
    layer.bank.draw_experts(new, generator)
    for expert, parent in zip(new.tolist(), plan.parents, strict=True):
        if parent == FRESH:
            continue
        router.logit_shift[expert] = router.logit_shift[parent]
        for rows in [*router.expert_rows(), *layer.bank.expert_rows()]:
            rows[expert] = rows[parent]
    router.logit_shift[:experts] += plan.logit_shift.to(router.logit_shift)
    for rows in layer.bank.expert_rows():
        rows[:experts] *= plan.bias_factor.to(rows).view(-1, *[1] * (rows.dim() - 1))
        neutral_state(optimizer, rows, 0, new, mean_moments(optimizer, rows, moments, old))
    for rows in router.expert_rows():
        neutral_state(optimizer, rows, 0, redrawn, mean_moments(optimizer, rows, moments, old))


def resize_units(bank: nn.Module, source: Tensor, optimizer: Optimizer | None) -> None:
    """Gather a bank's units: unit i becomes the old unit `source[i]`, optimizer state included.

    In place while the number of units stays the same; else new Parameters take the old ones' place
    in the bank and in the optimizer.
    """
    for name, axis in bank.unit_axes():  # type: ignore[operator]
        old: nn.Parameter = getattr(bank, name)
        gathered = old.detach().index_select(axis, source)
        if gathered.shape == old.shape:
            old.copy_(gathered)
            _gather_state(optimizer, old, old, axis, source)
        else:
            new = nn.Parameter(gathered, requires_grad=old.requires_grad)
            setattr(bank, name, new)
            _replace_parameter(optimizer, old, new)
            _gather_state(optimizer, old, new, axis, source)
    if len(source) != len(bank.segment):  # type: ignore[arg-type]
        bank.segment = torch.zeros_like(source)


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
    """Resize the pools of a fresh model to those of a saved `state_dict`, before it is loaded.

    Values are not restored here, only shapes; `load_state_dict` does the rest.
    """
    for name, layer in moe_layers(model):
        saved = len(state[f"{name}.bank.segment"])
        if saved != len(layer.bank.segment):
            source = torch.zeros(saved, dtype=torch.long, device=layer.bank.segment.device)
            resize_units(layer.bank, source, optimizer)


def _repeats(source: Tensor) -> Tensor:
    """[H'] bool: units whose source was already taken by an earlier unit."""
    seen: set[int] = set()
    out = [unit in seen or bool(seen.add(unit)) for unit in source.tolist()]  # type: ignore[func-returns-value]
    return torch.tensor(out, dtype=torch.bool)


def _gather_state(
    optimizer: Optimizer | None, old: Tensor, new: Tensor, axis: int, source: Tensor
) -> None:
    """Gather the optimizer state of `old` along `axis` and file it under `new`."""
    if optimizer is None or old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = value.index_select(axis, source)
    optimizer.state[new] = state


def _replace_parameter(optimizer: Optimizer | None, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` where `old` stands in the optimizer's parameter groups."""
    for group in [] if optimizer is None else optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]

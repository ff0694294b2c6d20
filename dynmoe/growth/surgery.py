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
    optimizer state; fresh ones, and second copies of a unit, start with neutral state (see
    `neutral_state`).

    Args:
        layer: the layer to grow.
        plan: where each unit and expert comes from.
        birth: growth count, noted as the new experts' birth.
        generator: draws the fresh weights.
        optimizer: its state follows the parameters; may have no state yet.
        moments: neutral second moments of fresh entries.

    Raises:
        UserError: the layer cannot hold that many experts.

    """
    old = layer.num_experts
    if len(plan.sizes) > layer.max_experts:
        raise UserError(
            f"cannot grow to {len(plan.sizes)} experts: the layer was made for at most "
            f"{layer.max_experts} (max_experts)"
        )
    new = torch.arange(old, len(plan.sizes))
    layer.router.alive[new] = True
    layer.birth[new] = birth
    _place_units(layer, plan, generator, optimizer, moments)
    _place_experts(layer, plan, new, generator, optimizer, moments)


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
    resize_units(bank, plan.source.clamp(min=0).to(device), optimizer)
    bank.set_hidden_sizes(plan.sizes)
    bank.draw_units(fresh.nonzero().flatten().to(device), generator)
    weight = bank.output_weight()
    weight.mul_(plan.factor.to(weight))
    restart = (fresh | _repeats(plan.source)).nonzero().flatten().to(device)
    for name, axis in bank.unit_axes():
        neutral_state(optimizer, getattr(bank, name), axis, restart, moments)


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
        neutral_state(optimizer, rows, 0, new, moments)
    for rows in router.expert_rows():
        neutral_state(optimizer, rows, 0, redrawn, moments)


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


def neutral_state(
    optimizer: Optimizer | None, parameter: Tensor, axis: int, index: Tensor, moments: Moments
) -> None:
    """Restart the optimizer state of the entries `index` along `axis`.

    First moments (Adam's exp_avg, SGD's momentum) become 0. Second moments become the mean of the
    tensor's other entries ("mean") or 0 ("zero"). With 0 under an old step count, Adam's bias
    correction has long faded, and the first update is (1 - b1) / sqrt(1 - b2) = 3.2 learning rates
    whatever the gradient; the mean gives fresh entries the step size of their neighbours.
    """
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    if not len(index):
        return
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        fill = 0.0
        if key in SECOND_MOMENTS and moments == "mean" and len(index) < value.shape[axis]:
            others = torch.ones(value.shape[axis], dtype=torch.bool, device=value.device)
            others[index] = False
            fill = float(value.index_select(axis, others.nonzero().flatten()).mean())
        value.index_fill_(axis, index, fill)


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

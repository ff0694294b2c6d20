"""The only code that rewrites a layer's parameters and their optimizer state, and takes it back.

At a constant budget everything happens in place: no Parameter is replaced and no unit that is kept
moves, so optimizers, data parallel wrappers and compiled graphs stay valid, and the cost is that of
the rows handed to new experts. Only a pool that gains units gets new Parameters, which take the old
ones' place in the module and in the optimizer. What a growth overwrites is kept until it has
succeeded, so that one that fails leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.initialisation import FRESH, Plan
from dynmoe.growth.optimizer_state import (
    Moments,
    mean_moments,
    neutral_state,
    pad,
    replace_parameter,
)
from dynmoe.growth.reshaping import Moved, reshape
from dynmoe.moe import ExpertBank, MoELayer, Router, UnitBank, moe_layers
from dynmoe.moe.draws import as_runs, set_entries, take_entries
from dynmoe.moe.experts.bottleneck import BottleneckBank

Means = Callable[..., dict[str, Tensor]]
"""`mean_moments` of an optimizer: (parameter, rows) -> second moments"""


@dataclass(frozen=True)
class Restart:
    """Entries of a parameter that hold new weights, drawn or copied."""

    parameter: nn.Parameter
    axis: int
    index: Tensor
    """[n] the entries along the axis"""
    second: dict[str, Tensor]
    """the second moments that they start with, see `mean_moments`"""

    @torch.no_grad()
    def carry_out(self, optimizer: Optimizer | None) -> None:
        """Set the entries' pending gradients to 0, and restart their optimizer state."""
        gradient = self.parameter.grad
        runs = as_runs(self.index, self.parameter) if self.axis else []
        if gradient is not None and len(self.index):
            dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
            set_entries(dense, self.axis, self.index, dense.new_zeros(()), runs)
            if dense is not gradient:
                self.parameter.grad = dense.to_sparse(gradient.sparse_dim())
        neutral_state(optimizer, self.parameter, self.axis, self.index, self.second, runs)


@torch.no_grad()
def grow_layer(
    layer: MoELayer,
    plan: Plan,
    created: int,
    generator: torch.Generator | None,
    optimizer: Optimizer | None = None,
    moments: Moments = "mean",
) -> list[Restart | Moved]:
    """Carry out a plan on one layer.

    Units that are taken over keep their weights (output weights times the plan's factor) and their
    optimizer state. That of fresh ones, and of second copies of a unit, is to restart: the returned
    records do that, once nothing can fail any more.

    Args:
        created: growth count, noted as the new experts' creation step.
        optimizer: its state follows the parameters; may have no state yet.
        moments: second moments of fresh entries, see `mean_moments`.

    Raises:
        UserError: the layer cannot hold that many experts.
    """
    check_room(layer, len(plan.sizes))
    new = torch.arange(len(plan.sizes) - len(plan.parents), len(plan.sizes))
    new = new.to(layer.created.device)
    layer.created[new] = created
    means = partial(mean_moments, optimizer, moments=moments)
    restarts: list[Restart | Moved] = []
    if isinstance(layer.bank, BottleneckBank):
        restarts += _reshape(layer.bank, plan, new, generator, optimizer, means)
    if isinstance(layer.bank, UnitBank):
        restarts += _place_units(layer.bank, plan, generator, optimizer, means)
    if not bool(layer.router.active[new].any()):  # else a layer that shares the router was first
        restarts += _place_routes(layer.router, plan, new, generator, means)
    return [*restarts, *_place_experts(layer.bank, plan, new, generator, means)]


def check_held(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Refuse parameters of MoE layers that a growth would put out of training, or untie.

    Raises:
        UserError: one that learns is not in the optimizer (None: not looked at), or one stands in
            two modules.
    """
    places = Counter(
        id(p) for m in model.modules() for p in m.parameters(recurse=False) if p is not None
    )
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    for layer_name, layer in moe_layers(model):
        bank = layer.bank
        units = bank.unit_axes() if isinstance(bank, UnitBank) else []
        replaced = {id(getattr(bank, name)) for name, _ in units} - held
        for own, parameter in layer.named_parameters():
            name = f"{layer_name}.{own}" if layer_name else own
            if places[id(parameter)] > 1:
                raise UserError(
                    f"growth: {name} is a parameter of two modules, and each would grow its own; "
                    "let one module stand in both places"
                )
            if optimizer is not None and parameter.requires_grad and id(parameter) in replaced:
                raise UserError(
                    f"growth: {name} learns, is not in the controller's optimizer, and is replaced "
                    "by a growth of budget per-growth, so that no optimizer would move it any "
                    "more; give the controller an optimizer that holds all of the MoE layers, or "
                    "freeze it (requires_grad_(False))"
                )


def check_room(layer: MoELayer, experts: int) -> None:
    """Refuse more experts than the layer was made for.

    Raises:
        UserError: it was made for fewer.
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
    means: Means,
) -> list[Restart]:
    """Hand units over where they stand, and copy or draw the others into what is left free."""
    place, stays = plan.places
    new = place[~stays]
    parameters = [getattr(bank, name) for name, _ in bank.unit_axes()]
    second = [means(p) if len(new) else {} for p in parameters]
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
    return [
        Restart(getattr(bank, name), axis, new, mean)
        for (name, axis), mean in zip(bank.unit_axes(), second, strict=True)
    ]


def _reshape(
    bank: BottleneckBank,
    plan: Plan,
    new: Tensor,
    generator: torch.Generator | None,
    optimizer: Optimizer | None,
    means: Means,
) -> list[Moved]:
    """Rescale bottlenecked experts."""
    assert plan.reshaping is not None
    second, more = means(bank.weights), len(plan.reshaping.source) - len(bank.weights)
    if more > 0:
        append_entries(bank, "weights", 0, more, optimizer)
    reshape(bank, plan.reshaping, new, generator)
    return [Moved(bank.weights, plan.reshaping, second)]


def _place_routes(
    router: Router, plan: Plan, new: Tensor, generator: torch.Generator | None, means: Means
) -> list[Restart]:
    """Let the new experts live, with router rows of their own."""
    experts = len(plan.sizes)
    reinit = torch.arange(experts, device=new.device) if plan.reinit_router else new
    second = [means(rows, rows=experts - len(new)) for rows in router.expert_rows()]
    router.active[new] = True
    router.draw_rows(reinit, generator)
    _copy_parents(router.expert_rows(), plan, new)
    for expert, parent in zip(new.tolist(), plan.parents, strict=True):
        if parent != FRESH:
            router.logit_shift[expert] = router.logit_shift[parent]
    router.logit_shift[:experts] += plan.logit_shift.to(router.logit_shift)
    pairs = zip(router.expert_rows(), second, strict=True)
    return [Restart(rows, 0, reinit, mean) for rows, mean in pairs]


def _place_experts(
    bank: ExpertBank, plan: Plan, new: Tensor, generator: torch.Generator | None, means: Means
) -> list[Restart]:
    """Give the new experts their rows in the bank."""
    experts = len(plan.sizes)
    bank.draw_experts(new, generator)
    _copy_parents(bank.expert_rows(), plan, new)
    for rows in bank.output_rows():
        rows[:experts] *= plan.bias_factor.to(rows).view(-1, *[1] * (rows.dim() - 1))
    if isinstance(bank, BottleneckBank):
        bank.output_weight().mul_(plan.bias_factor.to(bank.weights)[bank.segment])
    old = experts - len(new)
    return [Restart(rows, 0, new, means(rows, rows=old)) for rows in bank.expert_rows()]


def _copy_parents(tensors: list[nn.Parameter], plan: Plan, new: Tensor) -> None:
    """Copy the rows of the new experts' parents to them."""
    for expert, parent in zip(new.tolist(), plan.parents, strict=True):
        for rows in tensors:
            if parent != FRESH:
                rows[expert] = rows[parent]


def append_units(bank: UnitBank, count: int, optimizer: Optimizer | None) -> None:
    """Add `count` zero units at the end of a bank's pool, with zero optimizer state."""
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
    grad = old.grad
    if grad is not None and grad.layout == torch.strided:
        new.grad = pad(grad, axis, count)
    elif grad is not None:
        new.grad = pad(grad.to_dense(), axis, count).to_sparse(grad.sparse_dim())
    setattr(module, name, new)
    if optimizer is not None:
        replace_parameter(optimizer, old, new, axis)


class Undo:
    """Copies of what surgery is about to write in some layers, and what the optimizer holds.

    At a constant budget that is the weights of the units and rows that change; Parameters that will
    be replaced, with their gradients and state, are kept as they are, without a copy.
    """

    def __init__(
        self, layers: Sequence[MoELayer], plans: Sequence[Plan], optimizer: Optimizer | None
    ) -> None:
        self.optimizer = optimizer
        self._objects: list[tuple[nn.Module, str, Tensor]] = []
        self._values: dict[int, tuple[Tensor, int, Tensor | None, Tensor]] = {}
        self._bottlenecks = [x.bank for x in layers if isinstance(x.bank, BottleneckBank)]
        for layer, plan in zip(layers, plans, strict=True):
            self._keep_objects(layer)
            for parameter, axis, index in _written(layer, plan):
                self._keep(parameter, axis, index)
        if optimizer is not None:
            self._groups = [list(group["params"]) for group in optimizer.param_groups]
            self._state = dict(optimizer.state)

    @torch.no_grad()
    def roll_back(self) -> None:
        """Put everything back, objects and values."""
        for module, name, tensor in self._objects:
            setattr(module, name, tensor)
        for tensor, axis, index, before in self._values.values():
            if index is None:
                tensor.copy_(before)
            else:
                set_entries(tensor, axis, index, before)
        for bank in self._bottlenecks:
            bank.read_widths()
        if self.optimizer is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
                group["params"][:] = parameters
            self.optimizer.state.clear()
            self.optimizer.state.update(self._state)

    def _keep_objects(self, layer: MoELayer) -> None:
        """Note which tensors stand where, and copy the buffers, which are small."""
        for module in (layer, *layer.router.modules(), *layer.bank.modules()):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._objects.append((module, name, tensor))
            for buffer in module._buffers.values():
                if buffer is not None:
                    self._keep(buffer, 0, None)

    @torch.no_grad()
    def _keep(self, tensor: Tensor, axis: int, index: Tensor | None) -> None:
        """Copy some entries of a tensor, or all; once where layers share it."""
        if id(tensor) in self._values:
            return
        before = tensor.clone() if index is None else take_entries(tensor, axis, index)
        self._values[id(tensor)] = (tensor, axis, index, before)


@contextmanager
def rolled_back(undo: Sequence[Undo]) -> Iterator[None]:
    """Roll back if the block fails."""
    try:
        yield
    except BaseException:
        for one in undo:
            one.roll_back()
        raise


def _written(layer: MoELayer, plan: Plan) -> Iterator[tuple[nn.Parameter, int, Tensor | None]]:
    """(parameter, axis, index) of all weights that surgery writes; no index stands for all."""
    bank, experts = layer.bank, len(plan.sizes)
    for parameter in layer.router.parameters():
        yield parameter, 0, None
    new = torch.arange(experts - len(plan.parents), experts)
    outputs = bank.output_rows() if bool((plan.bias_factor != 1).any()) else []
    for rows in bank.expert_rows():
        scaled = any(rows is output for output in outputs)
        yield rows, 0, None if scaled else new
    if isinstance(bank, BottleneckBank):
        yield bank.weights, 0, None
    if isinstance(bank, UnitBank) and len(plan.source) == len(bank.segment):
        place, stays = plan.places
        scaled = bool((plan.factor != 1).any())
        for name, axis in bank.unit_axes():
            parameter = getattr(bank, name)
            whole = scaled and parameter is bank.output_weight()
            yield parameter, axis, None if whole else place[~stays]

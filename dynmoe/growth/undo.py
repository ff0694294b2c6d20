"""What a growth overwrites, kept until it has succeeded, so that one that fails leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.growth.init import Plan
from dynmoe.growth.optimizer_state import entry_state
from dynmoe.growth.surgery import new_units
from dynmoe.moe.bank import UnitBank, set_entries
from dynmoe.moe.layer import MoELayer


class Undo:
    """Copies of what surgery is about to write in some layers and in the optimizer.

    At a constant budget that is the weights, pending gradients and optimizer state of the units and
    rows that change; Parameters that will be replaced are kept as they are, without a copy.
    """

    def __init__(
        self, layers: Sequence[MoELayer], plans: Sequence[Plan], optimizer: Optimizer | None
    ) -> None:
        self.optimizer = optimizer
        self._objects: list[tuple[nn.Module, str, Tensor]] = []
        self._values: dict[tuple[int, int], tuple[Tensor, int, Tensor | None, Tensor]] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        for layer, plan in zip(layers, plans, strict=True):
            self._keep_objects(layer)
            for parameter, axis, index, scaled in _written(layer, plan):
                self._keep_entries(parameter, axis, index, scaled)
        if optimizer is not None:
            self._groups = [list(group["params"]) for group in optimizer.param_groups]
            self._state = dict(optimizer.state)

    @torch.no_grad()
    def roll_back(self) -> None:
        """Put everything back, objects and values."""
        for module, name, tensor in self._objects:
            setattr(module, name, tensor)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for tensor, axis, index, before in self._values.values():
            if index is None:
                tensor.copy_(before)
            else:
                set_entries(tensor, axis, index, before)
        if self.optimizer is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
                group["params"][:] = parameters
            self.optimizer.state.clear()
            self.optimizer.state.update(self._state)

    def _keep_objects(self, layer: MoELayer) -> None:
        """Note which tensors stand where, and copy the buffers, which are small."""
        for module in (layer, *layer.router.modules(), *layer.bank.modules()):
            self._objects += [(module, *named) for named in module.named_parameters(recurse=False)]
            for name, buffer in module.named_buffers(recurse=False):
                self._objects.append((module, name, buffer))
                self._keep(buffer, 0, None)

    def _keep_entries(
        self, parameter: nn.Parameter, axis: int, index: Tensor | None, scaled: bool
    ) -> None:
        """Copy entries of a parameter and of what belongs to it; all weights where it is scaled."""
        gradient = parameter.grad
        self._gradients.append((parameter, gradient))
        if gradient is not None and gradient.layout == torch.strided:
            self._keep(gradient, axis, index)
        self._keep(parameter.detach(), axis, None if scaled else index)
        if self.optimizer is not None:
            for _, value, its_axis in entry_state(self.optimizer, parameter, axis):
                self._keep(value, its_axis, index)

    def _keep(self, tensor: Tensor, axis: int, index: Tensor | None) -> None:
        """Copy some entries of a tensor, or all; once where layers share it."""
        key = (tensor.data_ptr(), axis)
        if key not in self._values:
            if index is None:
                before = tensor.clone()
            else:
                before = tensor.index_select(axis, index.to(tensor.device))
            self._values[key] = (tensor, axis, index, before)


@contextmanager
def rolled_back(undo: Sequence[Undo]) -> Iterator[None]:
    """Roll back if the block fails."""
    try:
        yield
    except BaseException:
        for one in undo:
            one.roll_back()
        raise


def _written(
    layer: MoELayer, plan: Plan
) -> Iterator[tuple[nn.Parameter, int, Tensor | None, bool]]:
    """(parameter, axis, index, scaled) of all that surgery writes.

    No index stands for all entries; `scaled` weights are written at every entry.
    """
    bank, experts = layer.bank, len(plan.sizes)
    for parameter in layer.router.parameters():
        yield parameter, 0, None, False
    new = torch.arange(experts - len(plan.parents), experts)
    scaled = bool((plan.bias_factor != 1).any())
    outputs = {id(rows) for rows in bank.output_rows()}
    for rows in bank.expert_rows():
        yield rows, 0, new, scaled and id(rows) in outputs
    if isinstance(bank, UnitBank) and len(plan.source) == len(bank.segment):
        scaled = bool((plan.factor != 1).any())
        for parameter, axis, index in new_units(bank, plan):
            yield parameter, axis, index, scaled and parameter is bank.output_weight()

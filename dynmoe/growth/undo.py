"""What a growth overwrites, kept until it has succeeded, so that one that fails leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.growth.initialisation import Plan
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.draws import set_entries, take_entries
from dynmoe.moe.layer import MoELayer


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
    if isinstance(bank, UnitBank) and len(plan.source) == len(bank.segment):
        place, stays = plan.places
        scaled = bool((plan.factor != 1).any())
        for name, axis in bank.unit_axes():
            parameter = getattr(bank, name)
            whole = scaled and parameter is bank.output_weight()
            yield parameter, axis, None if whole else place[~stays]

"""The hidden units of any network: what feeds each of them, and what it feeds.

Found by tracing the network with torch.fx. A layer of units is a linear or convolutional layer, an
activation function behind it (normalisation and dropout may stand between), and the linear,
convolutional or MoE layers that read the activations. The pool of an MoE layer is one such layer,
too; other banks (`bottleneck`, `networks`), and what feeds these, are left out. Units that are
added to others (behind a residual connection) have no output of their own and are left out.

Shapes: B samples, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.optimizer_state import neutral_state
from dynmoe.moe import MoELayer, UnitBank
from dynmoe.plasticity.probes import ACTIVATIONS

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
PASSED = (nn.Dropout, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""Modules through which a unit stays itself."""
Producer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, eq=False)
class Slot:
    """The entries of one parameter that belong to the units of a layer."""

    module: nn.Module
    name: str
    """of the parameter in the module: read it there, since growth may replace it"""
    axis: int
    repeat: int = 1
    """entries per unit: the positions of a feature map, or the tokens, that were flattened"""
    apart: bool = False
    """a unit's entries are U apart, as of flattened tokens; else they are consecutive"""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it is now."""
        return getattr(self.module, self.name)

    @property
    def bias(self) -> nn.Parameter | None:
        """What is added to these weights' outputs: a vector, in a pool maybe a row per expert."""
        return getattr(self.module, self.name.replace("w_", "b_").replace("weight", "bias"), None)

    def entries(self, units: Tensor) -> Tensor:
        """[n * repeat] positions along `axis` of the units [n], one unit after the other."""
        if self.repeat == 1:
            return units
        offsets = torch.arange(self.repeat, device=units.device)
        if self.apart:
            number = self.parameter.shape[self.axis] // self.repeat
            return (units.unsqueeze(1) + offsets * number).flatten()
        return (units.unsqueeze(1) * self.repeat + offsets).flatten()

    def unit_major(self, values: Tensor) -> Tensor:
        """Values of the parameter's shape as [U, everything else that belongs to a unit]."""
        first = values.movedim(self.axis, 0)
        if self.apart:
            first = first.unflatten(0, (self.repeat, -1)).transpose(0, 1)
        return first.reshape(values.shape[self.axis] // self.repeat, -1)


@dataclass(eq=False)
class UnitLayer:
    """One layer of hidden units."""

    name: str
    """of the module whose outputs they are, or of the MoE layer"""
    source: nn.Module
    """called once per forward pass: what stands before the activation function, or an MoE layer"""
    activation: nn.Module | None
    """the activation function; it may be shared between layers. None for an MoE layer"""
    bank: UnitBank | None
    """the pool that the units are, in an MoE layer: of its routed experts, or of its shared one"""
    incoming: list[Slot]
    """weights and biases that feed a unit, axis 0"""
    outgoing: list[Slot]
    """weights that read it"""
    norms: list[nn.Module] = field(default_factory=list)
    """normalisation layers between the weights and the activation"""

    @property
    def units(self) -> int:
        """U."""
        return self.incoming[0].parameter.shape[0]

    @property
    def frozen(self) -> bool:
        """Whether some of what feeds, normalises or reads the units does not learn."""
        around = [slot.parameter for slot in (*self.incoming, *self.outgoing)]
        around += [p for norm in self.norms for p in norm.parameters()]
        return not all(p.requires_grad for p in around)

    @torch.no_grad()
    def activations(self, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        """[rows, U] activations in one forward call of `source`: a row per sample and position.

        What an MoE layer's mask names padding has no row.
        """
        if self.bank is not None:
            assert isinstance(self.source, MoELayer)
            return full_precision(self.bank.hidden(self.source.real_rows(*inputs, **named)))
        assert self.activation is not None
        before = output.detach().movedim(1 if output.dim() == 4 else -1, -1)
        rows = before.flatten(0, -2).clone()  # the activation may work in place
        return full_precision(self.activation.forward(rows))  # past the hooks of others

    @torch.no_grad()
    def draw_incoming(self, index: Tensor, generator: torch.Generator) -> None:
        """Re-initialise what feeds the units `index` [n], from the range of torch's layers.

        Weights are uniform in +-1/sqrt(fan_in), biases 0; normalisation gets scale 1, shift 0 and
        the running statistics of a unit that has seen nothing.
        """
        if self.bank is not None:
            self.bank.draw_units(index, generator)
            return
        for slot in self.incoming:
            weight = slot.parameter
            if weight.dim() == 1:
                weight.index_fill_(0, index, 0.0)
                continue
            bound = weight[0].numel() ** -0.5
            fresh = torch.empty(len(index), *weight.shape[1:])
            fresh.uniform_(-bound, bound, generator=generator)
            weight.index_copy_(0, index, fresh.to(weight))
        for norm in self.norms:
            fills = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            for name, value in fills.items():
                tensor = getattr(norm, name, None)
                if tensor is not None and tensor.shape == (self.units,):
                    tensor.index_fill_(0, index, value)

    @torch.no_grad()
    def silence(self, index: Tensor) -> None:
        """Set the weights that read the units `index` [n] to 0."""
        for slot in self.outgoing:
            slot.parameter.index_fill_(slot.axis, slot.entries(index), 0.0)

    def restart_moments(self, index: Tensor, optimizer: Optimizer) -> None:
        """Forget the optimizer's state of all weights of the units `index` [n]; steps count on."""
        for slot in (*self.incoming, *self.outgoing):
            neutral_state(optimizer, slot.parameter, slot.axis, slot.entries(index), {})
        for norm in self.norms:
            for parameter in norm.parameters(recurse=False):
                if parameter.shape == (self.units,):
                    neutral_state(optimizer, parameter, 0, index, {})


def find_units(model: nn.Module) -> list[UnitLayer]:
    """All layers of hidden units of a network, in the order of its forward pass.

    Raises:
        UserError: torch.fx cannot trace the network, or it has no hidden units that can be found.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # fx raises what the traced code does
        reason = str(error).split("\n")[0]
        raise UserError(f"the hidden units of the network cannot be traced: {reason}") from error
    modules = dict(model.named_modules())
    found = []
    for node in graph.nodes:
        module = _called(node, modules)
        if isinstance(module, Producer):
            found += _behind(node, module, modules, graph)
        elif isinstance(module, MoELayer) and not any(layer.source is module for layer in found):
            found += [_pool(str(node.target), module, bank) for bank in unit_banks(module)]
    others = {
        m.bank.name for m in modules.values() if isinstance(m, MoELayer) and not unit_banks(m)
    }
    if not found and others:
        raise UserError(
            f"the network has no hidden units that can be found: those of bank {min(others)}, and "
            "those that feed it, are left out; use --bank pool, a larger network or another "
            "intervention"
        )
    if not found:
        raise UserError(
            "the network has no hidden units that can be found: activation functions must be "
            "modules (nn.ReLU() rather than F.relu) between linear or convolutional layers"
        )
    return found


def watch(
    layer: UnitLayer,
    number: int,
    seen: Callable[[int, Tensor], None],
    wanted: Callable[[], bool] = lambda: True,
) -> torch.utils.hooks.RemovableHandle:
    """Call `seen(number, activations [rows, U])` on every forward pass that training learns from.

    That is in training mode and with gradients: a PPO agent that only acts is not seen, nor is a
    pass of padding alone. Passes while `wanted()` is false cost nothing.
    """

    def hook(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        if module.training and torch.is_grad_enabled() and wanted():
            with torch.no_grad():
                activations = layer.activations(inputs, named, output)
                if len(activations):
                    seen(number, activations)

    return layer.source.register_forward_hook(hook, with_kwargs=True)


class _Tracer(fx.Tracer):
    """MoE layers are one piece, and so is what derives from torch's own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MoELayer | Producer) or super().is_leaf_module(
            m, module_qualified_name
        )


def unit_banks(layer: MoELayer) -> list[UnitBank]:
    """The pools of hidden units in an MoE layer: of the routed experts, and of the shared one."""
    banks = (layer.bank, layer.shared)
    return [bank for bank in banks if isinstance(bank, UnitBank) and not bank.per_sample]


def refuse_frozen(layers: list[UnitLayer], intervention: str) -> None:
    """Refuse an intervention on hidden units of which none can change.

    Raises:
        UserError: all layers are frozen, or read by a frozen one.
    """
    if all(layer.frozen for layer in layers):
        raise UserError(
            f"intervention {intervention}: every layer of hidden units is frozen or read by a "
            "frozen one, so it would do nothing; let one and its reader learn "
            "(requires_grad_(True)), or leave the intervention out"
        )


def full_precision(tensor: Tensor) -> Tensor:
    """A tensor of any shape, in float32 if it has fewer bits: means over many rows need them."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def renewed(layer: UnitLayer, model: nn.Module, before: dict[str, Tensor]) -> Tensor:
    """[U] bool: units whose incoming weights a growth has drawn, copied or added.

    Args:
        before: old values of the MoE layers' parameters, by name (see `Intervention.grown`).
    """
    names = {module: name for name, module in model.named_modules()}
    device = layer.incoming[0].parameter.device
    new = torch.zeros(layer.units, dtype=torch.bool, device=device)
    for slot in layer.incoming:
        prefix = names[slot.module]
        old = before.get(f"{prefix}.{slot.name}" if prefix else slot.name)
        if old is None:
            continue
        now = slot.parameter.detach()[tuple(slice(n) for n in old.shape)]
        new[: len(old)] |= (now != old).flatten(1).any(dim=1) if old.dim() > 1 else now != old
        new[len(old) :] = True
    return new


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return modules[str(node.target)] if node.op == "call_module" else None


def _behind(
    node: fx.Node, producer: Producer, modules: dict[str, nn.Module], graph: fx.Graph
) -> list[UnitLayer]:
    """The layer of units that a producer feeds; none where its outputs are no units."""
    norms: list[nn.Module] = []
    step, before = node, node
    while len(step.users) == 1:
        before, step = step, next(iter(step.users))
        module = _called(step, modules)
        if isinstance(module, ACTIVATIONS):
            units, tokens = producer.weight.shape[0], isinstance(producer, nn.Linear)
            readers = _readers(step, units, tokens, modules)
            targets = [other.target for other in graph.nodes]
            if not readers or targets.count(node.target) > 1 or targets.count(before.target) > 1:
                break
            names = ("weight",) if producer.bias is None else ("weight", "bias")
            incoming, source = [Slot(producer, n, 0) for n in names], modules[str(before.target)]
            return [UnitLayer(str(node.target), source, module, None, incoming, readers, norms)]
        if isinstance(module, NORMS):
            norms.append(module)
        elif not isinstance(module, PASSED) or isinstance(module, nn.Flatten):
            break
    return []


def _readers(node: fx.Node, units: int, tokens: bool, modules: dict[str, nn.Module]) -> list[Slot]:
    """What reads a node's output; empty where anything but weights does.

    Units are the last axis, so that those of several tokens alternate in flattened outputs, or
    (not `tokens`) the axis of a convolution's channels.
    """
    slots: list[Slot] = []
    for user in node.users:
        module = _called(user, modules)
        if isinstance(module, nn.Linear) and module.in_features % units == 0:
            slots.append(Slot(module, "weight", 1, module.in_features // units, tokens))
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            slots.append(Slot(module, "weight", 1))
        elif isinstance(module, MoELayer) and unit_banks(module):
            inner = [s for b in unit_banks(module) for s in _pool("", module, b).incoming]
            matrices = [s for s in inner if s.parameter.dim() == 2]
            slots += [
                Slot(s.module, s.name, 1, s.parameter.shape[1] // units, tokens) for s in matrices
            ]
        elif _keeps_units(user, module):
            if not (behind := _readers(user, units, tokens, modules)):
                return []
            slots += behind
        else:
            return []
    return slots


def _pool(name: str, layer: MoELayer, bank: UnitBank) -> UnitLayer:
    """The hidden units of an MoE layer."""
    out, axes = bank.output_weight(), bank.unit_axes()
    feeding = [Slot(bank, n, axis) for n, axis in axes if axis == 0]
    reading = [Slot(bank, n, axis) for n, axis in axes if getattr(bank, n) is out]
    name = name if bank is layer.bank else f"{name}.shared"
    return UnitLayer(name, layer, None, bank, feeding, reading)


def _keeps_units(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a unit's activations leave a node as one run per sample, as they came."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if isinstance(module, PASSED):
        return True
    if node.op == "call_module" or node.target not in ("flatten", torch.flatten):
        return False
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)

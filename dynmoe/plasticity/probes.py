"""One pass over a fixed probe batch: everything that the plasticity metrics read.

Shapes: N probe samples, C classes, d features, H hidden units of an expert bank, E active experts.
A probe is taken on the same samples each time, so that its numbers compare across training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import NumericError, UserError
from dynmoe.moe import MoELayer, UnitBank, moe_layers
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.model import undisturbed
from dynmoe.plasticity.functional import FunctionalActivations

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Tanh,
    nn.Hardtanh, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold,
)  # fmt: skip
"""Module types whose outputs count as hidden units; for functions see `functional`."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OUTPUTS = (nn.Linear, *CONVOLUTIONS, MoELayer)
"""Module types that may give a network's output."""
SEQUENCES = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)
"""Module types whose outputs of three axes are [N, C, length]."""
TOKENS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, MoELayer)
"""Module types whose outputs of three axes are [N, T, units]."""


@dataclass(frozen=True, eq=False)
class ExpertProbe:
    """One MoE layer in a probe. N is the number of real rows (samples or tokens) in its bank."""

    gates: Tensor
    """[N, E] gates of the active experts; rows sum to 1 for softmax routers"""
    hidden: Tensor
    """[N, H] activation of every hidden unit of the pool, whatever the routing"""
    segment: Tensor
    """[H] int, the expert that owns each hidden unit"""
    created: Tensor
    """[E] int, creation step: the growth count at which each expert was made"""
    weight_in: Tensor | None
    """[H, D_in] incoming weights (a reference, detached), or None for a bank without `w_in`"""
    weight_out: Tensor
    """[D_out, H] outgoing weights (a reference, detached)"""
    weight_in_grad: Tensor | None
    """[H, D_in] gradient of the mean loss, or None where there is none"""
    weight_out_grad: Tensor | None
    """[D_out, H] gradient of the mean loss, or None where there is none"""


@dataclass(frozen=True, eq=False)
class Probe:
    """What a network did on the probe batch, in eval mode. No tensor here carries a graph.

    Parameters with one row per expert (router rows, output biases) stand here without the rows
    reserved for experts to come: those neither act nor learn, and would blur norms and zero counts.
    """

    activations: dict[str, Tensor]
    """module name -> output of that activation function: [N, units], [N, T, units] for tokens,
    [N, C, height, width], or [N, C, length, 1] behind an `nn.Conv1d`; the k-th call of a shared
    module is `name#k`, and the hidden units of an MoE layer stand under `<layer>.hidden`"""
    features: Tensor
    """[N, d] what enters the classifier"""
    logits: Tensor
    """[N, C]; without labels, whatever the model gives"""
    loss: float | None
    """mean loss, cross entropy in nats by default; None without labels"""
    gradients: dict[str, Tensor]
    """parameter name -> gradient of the mean loss; parameters without one are absent"""
    parameters: dict[str, Tensor]
    """parameter name -> its value: a reference, which later training changes"""
    initial: dict[str, Tensor] | None
    """parameter name -> its value at the start, or None when that was not kept"""
    experts: dict[str, ExpertProbe]
    """MoE layer name -> its experts"""


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name, in their shapes, to be kept as a probe's `initial`."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outside_experts(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters outside MoE layers, in their shapes.

    Inside, growth moves units about.
    """
    layers = tuple(f"{name}." for name, _ in moe_layers(model))
    return {n: p for n, p in copy_parameters(model).items() if not n.startswith(layers)}


def take_probe(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None,
    initial: dict[str, Tensor] | None = None,
    classifier: nn.Module | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    functional: bool = False,
) -> Probe:
    """Run `model` once, forward and backward, in eval mode, and record what the metrics need.

    The model is left as it was: training flags, `.grad`, buffers, each MoE layer's last routing,
    torch's random state and hooks. Pass the plain module, not a DDP or compiled wrapper of it.

    Args:
        model: maps inputs to logits [N, C].
        inputs: [N, ...], on the model's device.
        labels: [N] int class indices, or what else `loss` compares the logits with. None: no loss,
            no gradients, and an output of any shape.
        initial: values at the start, by parameter name (see `copy_parameters`). Parameters it lacks
            are left out of the distance; growth must keep the shapes of the others in step.
        classifier: the module whose input is `features`; by default the first that the model's own
            `output_layers()` names, or else the last `nn.Linear` in module order that is not part
            of an MoE layer.
        loss: (logits [N, C], labels) -> scalar; cross entropy by default.
        functional: see activations that are called as functions, too, such as `F.relu`.

    Raises:
        ValueError: empty batch, logits not [N, C], no classifier to be found or one that was not
            called, or an initial value of another shape than its parameter.
        NumericError: the loss is not finite.
    """
    if len(inputs) == 0:
        raise ValueError("the probe batch is empty")
    parameters = dict(model.named_parameters())
    _check_initial(parameters, initial or {})
    classifier = output_layers(model)[0] if classifier is None else classifier
    with undisturbed(model), torch.set_grad_enabled(labels is not None):
        with _hooked(model, classifier, functional) as (activations, seen):
            logits = model(inputs)
        if not isinstance(logits, Tensor):
            raise ValueError(f"a probe needs a model that gives a tensor, not {type(logits)}")
        value = None if labels is None else _loss(logits, labels, loss, len(inputs))
        gradients = {} if value is None else _gradients(value, parameters)
        experts = _expert_probes(model, seen, gradients)
    if classifier not in seen:
        raise ValueError("the classifier was not called in the model's forward pass")
    hidden = {f"{name}.hidden": e.hidden for name, e in experts.items()}
    living = _living_rows(model)
    return Probe(
        activations={**activations, **hidden},
        features=_rows(seen[classifier], classifier),
        logits=logits.detach(),
        loss=None if value is None else value.item(),
        gradients=_cut(gradients, living),
        parameters=_cut({name: p.detach() for name, p in parameters.items()}, living),
        initial=None if initial is None else _cut(initial, living),
        experts=experts,
    )


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that give a network's outputs: those it names, or its last linear layer.

    Raises:
        ValueError: it names none and has no linear layer.
    """
    named = getattr(model, "output_layers", None)
    return [last_linear(model)] if named is None else named()


def last_linear(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` in module order that is not part of an MoE layer.

    Raises:
        ValueError: there is none.
    """
    inside = _inside_moe(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside]
    if not linear:
        raise ValueError("the model has no nn.Linear to take as its classifier; pass classifier=")
    return linear[-1]


def output_layer(model: nn.Module) -> nn.Module:
    """The last linear map, convolution or MoE layer in module order: what gives the output.

    Raises:
        UserError: there is none.
    """
    inside = _inside_moe(model)
    found = [m for m in model.modules() if isinstance(m, OUTPUTS) and m not in inside]
    if not found:
        raise UserError(
            "the model has no linear map, convolution or MoE layer, whose input would be its "
            "features; pass classifier=, the module that gives the output"
        )
    return found[-1]


def _rows(features: Tensor, classifier: nn.Module) -> Tensor:
    """What enters the classifier as rows [N, d]: a sample, a token or an image's position each."""
    if isinstance(classifier, CONVOLUTIONS):
        features = features.movedim(1, -1)
    return features.flatten(0, -2)


def _loss(
    logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor], count: int
) -> Tensor:
    """The mean loss of the logits [N, C] of `count` inputs."""
    if logits.ndim != 2 or len(logits) != count:
        raise ValueError("a probe needs a model that maps N inputs to logits [N, C]")
    value = loss(logits, labels)
    if not torch.isfinite(value):
        raise NumericError(f"the loss on the probe batch is {value.item()}")
    return value


@contextmanager
def _hooked(
    model: nn.Module, classifier: nn.Module, functional: bool
) -> Iterator[tuple[dict[str, Tensor], dict[nn.Module, Tensor]]]:
    """Outputs of activation modules, by name, and inputs of MoE layers and the classifier.

    With `functional`, outputs of activation functions, too. All are clones: a later operation in
    place may overwrite them. Hooks are gone after the block.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}
    calls: Counter[str] = Counter()
    sequence: torch.Size | None = None  # of the latest output, if it was [N, C, length]
    inside = _inside_moe(model)

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = (args[0] if args else next(iter(kwargs.values()))).detach().clone()

    def keep(name: str, output: Tensor) -> None:
        calls[name] += 1
        units = _as_image(output.detach().clone(), sequence)
        outputs[name if calls[name] == 1 else f"{name}#{calls[name]}"] = units

    def keep_output(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        keep(name, output)

    def note_axes(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal sequence
        is_sequence = isinstance(module, SEQUENCES) and output.ndim == 3
        sequence = output.shape if is_sequence else None

    handles: list[Any] = []
    functions = FunctionalActivations(keep)
    try:
        for name, module in model.named_modules():
            is_layer = isinstance(module, MoELayer) and module not in inside
            if module is classifier or is_layer:
                handles.append(module.register_forward_pre_hook(keep_input, with_kwargs=True))
            if isinstance(module, ACTIVATIONS) and module not in inside:
                hook = partial(keep_output, name or "model")
                handles.append(module.register_forward_hook(hook))
            if isinstance(module, (*SEQUENCES, *TOKENS)) and module not in inside:
                handles.append(module.register_forward_hook(note_axes))
            if functional:
                counted = not is_layer and not isinstance(module, ACTIVATIONS)
                handles += functions.watch(name, module, counted)
        with functions if functional else nullcontext():
            yield outputs, inputs
    finally:
        for handle in handles:
            handle.remove()


def _as_image(units: Tensor, sequence: torch.Size | None) -> Tensor:
    """Units [N, C, length] as [N, C, length, 1]; all others as they are.

    Args:
        units: output of an activation.
        sequence: shape of the layer's output before it if that is [N, C, length], else None. Units
            that have neither its channels nor its length in place were transposed in between.
    """
    if sequence is None or units.ndim != 3:
        return units
    kept = units.shape[1] == sequence[1] or units.shape[2] == sequence[2]
    return units.unsqueeze(-1) if kept else units


def _inside_moe(model: nn.Module) -> set[nn.Module]:
    """The modules that are parts of MoE layers: their units are read from the bank itself."""
    layers = [layer for _, layer in moe_layers(model)]
    return {part for layer in layers for part in layer.modules() if part is not layer}


def _gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients by name, without touching `.grad`; parameters that get none are left out."""
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    if not learning or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return {n: g.detach() for n, g in zip(learning, found, strict=True) if g is not None}


@torch.no_grad()
def _expert_probes(
    model: nn.Module, seen: dict[nn.Module, Tensor], gradients: dict[str, Tensor]
) -> dict[str, ExpertProbe]:
    """Read each MoE layer that ran, in module order."""
    names = {id(p): name for name, p in model.named_parameters()}
    probes = {}
    for name, layer in moe_layers(model):
        if layer not in seen:
            continue
        bank, living, routing = layer.bank, layer.num_experts, layer.last_routing
        if not isinstance(bank, UnitBank | BottleneckBank) or bank.per_sample:
            continue  # no hidden units to look at, or one activation per position and unit
        assert routing is not None  # the layer ran: its input was seen
        rows = seen[layer].flatten(0, -2)
        if len(rows) != len(routing.gates):  # tokens of samples that were routed as a whole
            routing = routing.repeated(len(rows) // len(routing.gates))
        if not len(rows := routing.real(rows)):
            continue  # nothing but padding
        w_in, w_out = dict(bank.named_parameters()).get("w_in"), bank.output_weight()
        w_out_grad = gradients.get(names.get(id(w_out), ""))
        if isinstance(bank, BottleneckBank):  # its units' weights are parts of one vector
            gradient = gradients.get(names[id(bank.weights)])
            w_out_grad = None if gradient is None else bank.output_weight(gradient)
        probes[name or "model"] = ExpertProbe(
            gates=routing.real(routing.gates).detach()[:, :living].clone(),
            hidden=bank.hidden(rows.to(w_out.dtype)),  # other if the pass had its own autocast
            segment=bank.segment.clone(),
            created=layer.created[:living].clone(),
            weight_in=None if w_in is None else w_in.detach(),
            weight_out=w_out.detach(),
            weight_in_grad=None if w_in is None else gradients.get(names[id(w_in)]),
            weight_out_grad=w_out_grad,
        )
    return probes


def _living_rows(model: nn.Module) -> dict[str, int]:
    """Parameter name -> number of active experts, for parameters with one row per expert."""
    names = {id(p): name for name, p in model.named_parameters()}
    rows = {}
    for _, layer in moe_layers(model):
        for parameter in (*layer.router.expert_rows(), *layer.bank.expert_rows()):
            rows[names[id(parameter)]] = layer.num_experts
    return rows


def _cut(tensors: dict[str, Tensor], rows: dict[str, int]) -> dict[str, Tensor]:
    """The tensors, those named in `rows` as views of that many first rows."""
    return {n: t[: rows[n]] if n in rows else t for n, t in tensors.items()}


def _check_initial(parameters: dict[str, nn.Parameter], initial: dict[str, Tensor]) -> None:
    for name, value in initial.items():
        if name in parameters and parameters[name].shape != value.shape:
            raise ValueError(
                f"initial value of {name!r} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(parameters[name].shape)}: growth must carry the initial values along"
            )

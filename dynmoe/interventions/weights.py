"""A network's weight matrices, its output layers, and new first values for it.

Like `units.py` these know linear and convolutional layers and the pools of MoE layers. Routers are
left out: what they do is bounded by their softmax, and growth re-initialises their rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.interventions.units import Slot, unit_banks
from dynmoe.moe import AuxLoss, ExpertBank, MoELayer, MultiHead, Router, UnitBank, moe_layers
from dynmoe.moe.draws import Noise
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.hyper import HyperMoE
from dynmoe.moe.upcycle import Adapted
from dynmoe.plasticity.probes import output_layers

CORE = (MoELayer, MultiHead, Router, ExpertBank, AuxLoss, Noise, Adapted, HyperMoE)
"""Modules that a reset would take back to the number of experts that they started with."""


def weight_matrices(model: nn.Module, outputs: bool = True) -> list[Slot]:
    """The weights of every linear and convolutional layer, and those of MoE layers' pools.

    Weights of a convolution are [out, in, height, width]. Frozen ones are left out. Ask each time:
    training may replace them.

    Args:
        outputs: with those that give the network's outputs.
    """
    inside = {part for _, layer in moe_layers(model) for part in layer.modules()}
    last = set() if outputs else set(output_layers(model))
    found = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in inside | last:
            found.append(Slot(module, "weight", 0))
        elif isinstance(module, MoELayer):
            for bank in unit_banks(module):
                left_out = bank.output_weight() if module in last else None
                for name, _ in bank.unit_axes():
                    weight = getattr(bank, name)
                    if weight.dim() >= 2 and weight is not left_out:
                        found.append(Slot(bank, name, 0))
    return [slot for slot in found if slot.parameter.requires_grad]


def linear_outputs(model: nn.Module, intervention: str) -> list[nn.Linear]:
    """The output layers, which an intervention needs to be linear.

    Raises:
        UserError: one is not.
    """
    layers = output_layers(model)
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"intervention {intervention} needs linear output layers, and here one is an "
                f"{type(layer).__name__}; use a method or place with dense heads"
            )
    return cast(list[nn.Linear], layers)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands below the model; also for a compiled `old`, uncompiled."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not old:
                continue
            if name == "_orig_mod" and parent is not model:
                replace_module(model, parent, new)  # it would go on calling what it compiled
            else:
                setattr(parent, name, new)


def swap_parameter(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Train `new` in the place of `old`, with optimizer state that is still to begin."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state.pop(old, None)


@torch.no_grad()
def fresh_draw(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """New first values of a network's parameters, by name, in their shapes, on their device.

    Modules are drawn by their own `reset_parameters`, as torch's layers have, attention as torch
    does, MoE layers as at their start. Parameters of other modules are left out: nobody knows what
    they are drawn from.
    """
    twin = copy.deepcopy(model).cpu()
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn: set[Tensor] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in twin.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and not isinstance(module, CORE):
                reset()
                drawn |= set(module.parameters(recurse=False))
        for module in twin.modules():  # after their parts, which they draw in their own way
            if isinstance(module, HyperMoE):
                module.reset_hypernetwork()
            elif isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
            else:
                continue
            drawn |= set(module.parameters(recurse=False))
    for _, layer in moe_layers(twin):
        experts = torch.arange(layer.max_experts)
        layer.router.draw_rows(experts, generator)
        drawn |= set(layer.router.expert_rows())
        for bank in (layer.bank, layer.shared):
            drawn |= set() if bank is None else _draw_bank(bank, generator)
    device = {name: p.device for name, p in model.named_parameters()}
    return {name: p.detach().to(device[name]) for name, p in twin.named_parameters() if p in drawn}


def _draw_bank(bank: ExpertBank, generator: torch.Generator) -> set[Tensor]:
    """Re-initialise all of a bank; returns the parameters drawn."""
    drawn: set[Tensor] = set(bank.expert_rows())
    if isinstance(bank, UnitBank):
        bank.draw_units(torch.arange(len(bank.segment)), generator)
        drawn |= {getattr(bank, name) for name, _ in bank.unit_axes()}
    if isinstance(bank, BottleneckBank):
        drawn.add(bank.weights)  # drawn with the experts
    if bank.expert_rows():
        bank.draw_experts(torch.arange(len(bank.expert_rows()[0])), generator)
    return drawn


class Anchor:
    """Each parameter's value at the start.

    What a growth draws, copies or rescales starts with the value that the growth gave it.

    Args:
        model: its present weights are the first ones.

    Attributes:
        first: parameter name -> its value at the start; this is the whole state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first = {name: p.detach().clone() for name, p in model.named_parameters()}

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, its value at the start, of its shape), for all that learn."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield parameter, self.first[name]

    def load(self, first: dict[str, Tensor]) -> None:
        """Take copies of saved first values, in the parameters' shapes, to where these are."""
        parameters = dict(self.model.named_parameters())
        self.first = {name: first[name].clone().to(p.device) for name, p in parameters.items()}

    @torch.no_grad()
    def grown(self, before: dict[str, Tensor]) -> None:
        """The network has grown; `before` holds parameters that growth may have changed, by name.

        Old shapes are at most as large as new ones along each axis.
        """
        parameters = dict(self.model.named_parameters())
        for name, old in before.items():
            born = parameters[name].detach().clone()
            kept = tuple(slice(0, n) for n in old.shape)
            same = born[kept] == old
            born[kept] = torch.where(same, self.first[name], born[kept])
            self.first[name] = born
        for name in parameters.keys() - self.first.keys():
            self.first[name] = parameters[name].detach().clone()

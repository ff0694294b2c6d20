"""A network's weight matrices, its output layers, and new first values for it.

Like `units.py` these know linear and convolutional layers and the pools of MoE layers. Routers are
left out: what they do is bounded by their softmax, and growth re-initialises their rows.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.interventions.units import Slot, unit_banks
from dynmoe.moe import AuxLoss, ExpertBank, MoELayer, MultiHead, Router, UnitBank, moe_layers
from dynmoe.moe.draws import Noise
from dynmoe.plasticity.probes import last_linear

CORE = (MoELayer, MultiHead, Router, ExpertBank, AuxLoss, Noise)
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
                names = [n for n, _ in bank.unit_axes() if getattr(bank, n).dim() >= 2]
                out = bank.output_weight()
                found += [
                    Slot(bank, name, 0)
                    for name in names
                    if module not in last or getattr(bank, name) is not out
                ]
    return [slot for slot in found if slot.parameter.requires_grad]


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that give a network's outputs: those it names, or its last linear layer."""
    named = getattr(model, "output_layers", None)
    return [last_linear(model)] if named is None else named()


def linear_outputs(model: nn.Module, intervention: str) -> list[nn.Linear]:
    """The output layers, which an intervention needs to be linear.

    Raises:
        UserError: one is not.
    """
    found = []
    for layer in output_layers(model):
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"intervention {intervention} needs linear output layers, and here one is an "
                f"{type(layer).__name__}; use a method or place with dense heads"
            )
        found.append(layer)
    return found


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `old` stands, wherever that is."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def swap_parameter(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Train `new` in the place of `old`, with optimizer state that is still to begin."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state.pop(old, None)


@torch.no_grad()
def fresh_draw(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """New first values of a network's parameters, by name, on their device.

    Torch's layers are drawn by their own `reset_parameters`, MoE layers as at their start.
    Parameters of other modules are left out.
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
    if bank.expert_rows():
        bank.draw_experts(torch.arange(len(bank.expert_rows()[0])), generator)
    return drawn

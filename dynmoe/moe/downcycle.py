"""Down-cycling: an MoE layer becomes a dense MLP.

Shapes: N samples, E experts before and K after, M most experts, H hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.experts.pool import HiddenPool
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.model import undisturbed
from dynmoe.moe.router import Routing


@torch.no_grad()
def merge(layer: MoELayer, x: Tensor | None = None) -> nn.Sequential:
    """The MLP `Linear, activation, Linear` with every expert's units, [..., D_in] -> [..., D_out].

    Each unit's output weights, and each expert's output bias, are multiplied by the mean over x of
    the expert's gate (its scale included), so that the function is kept where gates do not depend
    on the input. Without x, gates are taken as equal and as summing to 1. A shared expert's units
    come last. `function_change(layer, mlp, x)` tells how close the two are.

    Raises:
        UserError: another bank than the pool, or no x where gates have a scale of their own.
    """
    bank, experts = layer.bank, layer.num_experts
    if not isinstance(bank, HiddenPool):
        raise UserError(f"merge: bank {bank.name!r} has no dense counterpart; allowed is 'pool'")
    if x is not None:
        routing = route(layer, x)
        gates = routing.mean(routing.gates * layer.scale(routing))
    elif layer.router.normalised:
        gates = layer.router.active.to(bank.w_out) * (layer.gate_factor(experts) / experts)
    else:
        raise UserError(
            f"merge: the gates of router {layer.router.name!r} have a scale of their own; give x"
        )
    gates = gates.to(bank.w_out)
    w_in: Tensor = bank.w_in
    b_in: Tensor = bank.b_in
    w_out, b_out = bank.w_out * gates[bank.segment], gates @ bank.b_out
    if isinstance(shared := layer.shared, HiddenPool):
        w_in, b_in = torch.cat([w_in, shared.w_in]), torch.cat([b_in, shared.b_in])
        w_out = torch.cat([w_out, shared.w_out], dim=1)
        b_out = b_out + shared.b_out[0]
    mlp = nn.Sequential(_linear(w_in, b_in), copy.deepcopy(bank.act), _linear(w_out, b_out))
    return mlp.train(layer.training)


def distil(
    layer: MoELayer,
    batches: Sequence[Tensor],
    steps: int,
    lr: float = 1e-3,
    generator: torch.Generator | None = None,
) -> tuple[nn.Sequential, list[float]]:
    """Fit the merged MLP to the layer's outputs: Adam on their mean squared difference.

    The idea of one dense student that first gathers the experts' weights and is then distilled is
    OneS's (Xue et al. 2022, arXiv 2201.10890); gathering by mean gates and the plain
    squared error are our choice.

    Args:
        layer: the teacher, in evaluation mode; it is left as it was.
        batches: inputs of the layer; each step takes one of them.
        generator: draws the batches' order; None: torch's global one.

    Returns:
        The MLP, and the loss [steps] before each step.

    Raises:
        UserError: no batch, steps below 0, lr not above 0, or a bank that `merge` refuses.
    """
    if not batches or steps < 0 or lr <= 0:
        raise UserError(
            f"distil: {len(batches)} batches, steps={steps} and lr={lr} must be at least 1, at "
            "least 0 and above 0"
        )
    mlp = merge(layer, batches[0])
    with undisturbed(layer), torch.no_grad():
        targets = [layer(x) for x in batches]
    optimizer = torch.optim.Adam(mlp.parameters(), lr)
    curve = []
    for index in torch.randint(len(batches), (steps,), generator=generator).tolist():
        optimizer.zero_grad()
        loss = F.mse_loss(mlp(batches[index]), targets[index])
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return mlp, curve


@torch.no_grad()
def route(layer: MoELayer, x: Tensor) -> Routing:
    """Where the layer sends x [..., D] in evaluation mode; the layer is left as it was."""
    with undisturbed(layer):
        layer(x)
        assert layer.last_routing is not None
        return layer.last_routing


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with copies of these parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear

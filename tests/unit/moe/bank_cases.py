"""Every registered bank in a small layer, and what one of its experts says, spelled out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.moe import MoELayer, UnitBank

BANKS = registry.names("bank")
WITH_UNITS = [name for name in BANKS if issubclass(registry.get("bank", name), UnitBank)]
WITHOUT_UNITS = [name for name in BANKS if name not in WITH_UNITS]
ROUTERS = ("cosine", "topk")  # dense and sparse
WIDTHS = {name: (5, 5) if name == "affine" else (5, 4) for name in BANKS}
HIDDEN, EXPERTS, ROOM = 12, 3, 6


def make_layer(
    name: str, router: str = "cosine", bank: dict[str, Any] | None = None, **options: Any
) -> MoELayer:
    """A float64 layer in which nothing is 0, its units scattered as growth leaves them."""
    options = {"num_experts": EXPERTS, "max_experts": ROOM, "activation": "tanh"} | options
    layer = MoELayer(
        *WIDTHS[name],
        options.pop("hidden", HIDDEN),
        bank=registry.get("bank", name).Config(**bank or {}),
        router=registry.get("router", router).Config(),
        **options,
    ).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1.0, 1.0)
    if isinstance(layer.bank, UnitBank):
        segment = layer.bank.segment
        segment.copy_(segment[torch.randperm(len(segment))])
    return layer


def samples(name: str, count: int = 6, width: int = 5) -> Tensor:
    """Float64 inputs: rows, images for conv, sequences for affine."""
    shapes = {"conv": (count, width, 3, 4), "affine": (count, 2, width)}
    return torch.randn(shapes.get(name, (count, width)), dtype=torch.double)


def active_rows(layer: MoELayer) -> dict[str, int]:
    """Parameter name -> active experts, for parameters with a row per expert."""
    rows = {id(p) for p in (*layer.router.expert_rows(), *layer.bank.expert_rows())}
    return {n: layer.num_experts for n, p in layer.named_parameters() if id(p) in rows}


def loop(layer: MoELayer, x: Tensor) -> Tensor:
    """The definition of a layer: experts one by one, sample by sample, added up by gate."""
    name, axis = layer.bank.name, layer.bank.channel_axis
    seen = x if x.dim() == 2 else x.movedim(axis, -1).flatten(1, -2).mean(dim=1)
    gates = layer.router(seen).gates
    if layer.gate_scale == "experts":
        gates = gates * (gates > 0).sum(dim=1, keepdim=True)
    rows = []
    for n in range(len(x)):
        one = x[n : n + 1]
        row = sum(gates[n, e] * alone(name, layer.bank, e, one) for e in range(layer.num_experts))
        rows.append(row if layer.shared is None else row + alone(name, layer.shared, 0, one))
    return torch.cat(rows)


def alone(name: str, bank: Any, expert: int, x: Tensor) -> Tensor:
    """What one expert says to x, from its formula."""
    return globals()[f"_{name}"](bank, expert, x)


def _pool(bank: Any, e: int, x: Tensor) -> Tensor:
    own = bank.segment == e
    return torch.tanh(x @ bank.w_in[own].T + bank.b_in[own]) @ bank.w_out[:, own].T + bank.b_out[e]


def _swiglu(bank: Any, e: int, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), len(bank.w_out), dtype=x.dtype)
    for unit in (bank.segment == e).nonzero().flatten().tolist():
        gate, value = x @ bank.w_gate[unit], x @ bank.w_in[unit]
        y = y + torch.outer(gate / (1 + torch.exp(-gate)) * value, bank.w_out[:, unit])
    return y


def _lora(bank: Any, e: int, x: Tensor) -> Tensor:
    own = bank.segment == e
    update = bank.w_out[:, own] @ bank.w_in[own]
    ranks_at_start = len(bank.segment) if bank.max_experts == 1 else HIDDEN
    return 16.0 / ranks_at_start * x @ update.T


def _conv(bank: Any, e: int, x: Tensor) -> Tensor:
    own = bank.segment == e
    kernel, (height, width) = bank.w_in.shape[-1], x.shape[-2:]
    wide = torch.zeros(*x.shape[:2], height + kernel - 1, width + kernel - 1, dtype=x.dtype)
    wide[:, :, kernel // 2 : kernel // 2 + height, kernel // 2 : kernel // 2 + width] = x
    rows = []
    for i in range(height):
        for j in range(width):
            patch = wide[:, :, i : i + kernel, j : j + kernel].flatten(1)
            hidden = torch.tanh(patch @ bank.w_in[own].flatten(1).T + bank.b_in[own])
            rows.append(hidden @ bank.w_out[:, own, 0, 0].T + bank.b_out[e])
    return torch.stack(rows, dim=2).unflatten(2, (height, width))


def _affine(bank: Any, e: int, x: Tensor) -> Tensor:
    return x * bank.gamma[e] + bank.beta[e]


def _networks(bank: Any, e: int, x: Tensor) -> Tensor:
    for weight, bias in list(zip(bank.weights, bank.biases, strict=True))[:-1]:
        x = torch.tanh(x @ weight[e].T + bias[e])
    return x @ bank.weights[-1][e].T + bank.biases[-1][e]


def _bottleneck(bank: Any, e: int, x: Tensor) -> Tensor:
    """The vector cut up by hand."""
    place, found = 0, []
    widths = [(a, b, c) for a, b, c in bank.widths.tolist() if a]
    dim_in, dim_out = x.shape[1], bank.b_out.shape[1]
    for name in ("w1", "b1", "w2", "b2", "w3", "b3", "w4"):
        for expert, (a, b, c) in enumerate(widths):
            shape = {"w1": (a, dim_in), "b1": (a,), "w2": (b, a), "b2": (b,), "w3": (c, b),
                     "b3": (c,), "w4": (c, dim_out)}[name]  # fmt: skip
            size = torch.Size(shape).numel()
            if expert == e:
                found.append(bank.weights[place : place + size].view(shape))
            place += size
    w1, b1, w2, b2, w3, b3, w4 = found
    h = torch.tanh(torch.tanh(torch.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3)
    return h @ w4 + bank.b_out[e]

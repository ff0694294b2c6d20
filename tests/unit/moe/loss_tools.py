"""Small layers, and one loss on one pass of them, for the tests of auxiliary losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynmoe import registry
from dynmoe.moe import AuxLoss, LossInput, MoELayer, Routing

DIM, OUT, ROOM = 4, 3, 5


def make_layer(router: str = "cosine", experts: int = 3, bank: str = "pool", **options: Any):
    """A float64 layer 4 -> 3 of 12 hidden units with room for five experts, in training mode."""
    config = registry.get("router", router).Config(**options)
    layer = MoELayer(
        DIM, OUT, 12, num_experts=experts, max_experts=ROOM, router=config,
        bank=registry.get("bank", bank).Config(), activation="tanh",
        generator=torch.Generator().manual_seed(0),
    ).double()  # fmt: skip
    if bank == "pool" and experts == 3:
        layer.bank.set_hidden_sizes([5, 3, 4])
    return layer


def make_loss(name: str, room: int = ROOM, **options: Any) -> AuxLoss:
    return registry.get("loss", name).Config(**options).build(room)


def given_by(layer: MoELayer, x: Tensor, mask: Tensor | None = None) -> LossInput:
    """What a loss reads in a pass of x [N, D]."""
    return LossInput(x, layer.router(x, mask), layer.router, layer.bank)


def loss_of(name: str, layer: MoELayer, x: Tensor, mask: Tensor | None = None, **options: Any):
    return make_loss(name, layer.max_experts, **options)(given_by(layer, x, mask))


def samples(n: int = 9, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, DIM, dtype=torch.double)


def given_routing(layer: MoELayer, **fields: Any) -> LossInput:
    """A pass whose routing is made up: tensors by name; what is missing is 0."""
    n = len(next(iter(fields.values())))
    zeros = torch.zeros(n, layer.max_experts, dtype=torch.double)
    fields = {"gates": zeros, "logits": zeros, "probabilities": zeros} | fields
    return LossInput(
        samples(n), Routing(active=layer.router.active, **fields), layer.router, layer.bank
    )


def close(got: Tensor, want: float | Tensor) -> None:
    want = torch.as_tensor(want, dtype=torch.double)
    torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)

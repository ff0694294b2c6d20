"""Frozen adapters: mixed as the sum of their updates by the head's softmax; only heads learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.initialisation import RandomInit
from dynmoe.moe import MoELayer
from dynmoe.moe.experts.low_rank import LoRAPool
from dynmoe.moe.upcycle import adapt_linears
from dynmoe.moe.xlora import adapter_of, mix_adapters, set_adapter


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def adapter(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    def part(dim_in: int, dim_out: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(rank, dim_in, dtype=torch.double),
                torch.randn(dim_out, rank, dtype=torch.double))  # fmt: skip

    return {"0": part(5, 6), "2": part(6, 4)}


def test_updates_are_mixed_by_the_head_in_every_layer():
    model, adapters, x = base(), [adapter(2), adapter(1), adapter(3)], torch.randn(7, 5).double()
    mixed = mix_adapters(model, adapters, max_experts=4)
    h, plain = x, base()
    for name, after in (("0", torch.tanh), ("2", lambda y: y)):
        router = mixed[name].layer.router
        hidden = (h @ router.head.weight.T + router.head.bias).clamp(min=0)
        gates = (hidden @ router.weight[:3].T).softmax(dim=1)
        y = h @ plain[int(name)].weight.T + plain[int(name)].bias
        for e, own in enumerate(adapters):
            a, b = own[name]
            y = y + gates[:, e : e + 1] * (h @ a.T @ b.T)
        h = after(y)
    torch.testing.assert_close(model(x), h)
    model(x).square().sum().backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(".router." in name for name in taught) and len(taught) == 6


def test_what_adapt_linears_has_trained_can_be_mixed():
    model, x = base(), torch.randn(7, 5).double()

    def make(i: int, o: int) -> MoELayer:
        return MoELayer(i, o, 2, bank="lora")

    adapted = adapt_linears(model, r"^\d$", make)
    for module in adapted.values():
        nn.init.normal_(module.layer.bank.w_out)
    again = base()
    mix_adapters(again, [adapter_of(model)] * 2)
    torch.testing.assert_close(again(x), model(x))


def test_an_adapter_that_comes_later():
    model, x = base(), torch.randn(7, 5).double()
    mixed = mix_adapters(model, [adapter(2), adapter(2)], max_experts=3)
    layer, later = mixed["0"].layer, adapter(2)
    old = layer.bank.expert_outputs(x)[:2]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    GrowthController(
        model, optimizer, budget=Budget(mode="per-growth", units=2),
        init=RandomInit.Config(router="new"),
    ).grow(1)  # fmt: skip
    for name, (a, b) in later.items():
        set_adapter(mixed[name].layer, 2, a, b)
    outputs = layer.bank.expert_outputs(x)
    torch.testing.assert_close(outputs[:2], old)
    torch.testing.assert_close(outputs[2], x @ later["0"][0].T @ later["0"][1].T)
    assert not any(p.requires_grad for p in layer.bank.parameters())
    before = copy.deepcopy(layer.router.weight)
    model(x).square().sum().backward()
    optimizer.step()
    assert (layer.router.weight != before).any(dim=1).tolist() == [True] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mix_adapters(base(), []), "no adapter is given"),
        (
            lambda: mix_adapters(base(), [adapter(1), {"0": adapter(1)["0"]}]),
            "2 is in adapter 1 or in the first one only",
        ),
        (
            lambda: mix_adapters(base(), [{"0": adapter(1)["2"]}]),
            "adapter of 0: A and B are .*, and must be",
        ),
        (lambda: mix_adapters(base(), [{"9": adapter(1)["0"]}]), "'9' is not a linear layer"),
        (lambda: adapter_of(base()), "the model has no adapters"),
        (
            lambda: set_adapter(MoELayer(5, 6, 8), 0, *adapter(1)["0"]),
            "bank 'pool' holds no adapters",
        ),
        (
            lambda: set_adapter(MoELayer(5, 6, 2, bank=LoRAPool.Config()), 1, *adapter(2)["0"]),
            "expert=1 must be one of the 1 there",
        ),
    ],
)
def test_what_cannot_be_mixed(call, message):
    with pytest.raises(UserError, match=message):
        call()

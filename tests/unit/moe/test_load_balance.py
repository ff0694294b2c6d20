"""The Switch balancing loss against a restatement, and how layers report it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.moe import LossInput, MoELayer, Routing, collect_aux_losses
from dynmoe.moe.losses.balance import SwitchLoss

ROUTERS = ("cosine", "softmax", "topk")  # dense and sparse


def make_layer(router: str, weight: float, experts: int = 3) -> MoELayer:
    config = registry.get("router", router).Config()
    losses = (SwitchLoss.Config(weight=weight),) if weight else ()
    return MoELayer(4, 4, 12, num_experts=experts, max_experts=5, router=config, losses=losses)


def switch_loss(logits: Tensor, experts: int, k: int) -> float:
    """E * sum_e f_e P_e, sample by sample."""
    share, mean = [0.0] * experts, [0.0] * experts
    for row in logits[:, :experts]:
        for expert in row.topk(k).indices.tolist():
            share[expert] += 1 / (k * len(logits))
        for expert, p in enumerate(row.softmax(dim=0).tolist()):
            mean[expert] += p / len(logits)
    return experts * sum(f * p for f, p in zip(share, mean, strict=True))


@pytest.mark.parametrize("experts", [1, 3, 5])
@pytest.mark.parametrize("router", ROUTERS)
def test_load_balance_is_the_switch_loss(router, experts):
    layer = make_layer(router, 1.0, experts)
    layer(torch.randn(50, 4))
    routing = layer.last_routing
    k = 1 if routing.chosen is None else min(layer.router.k, experts)
    expected = switch_loss(routing.logits.detach(), experts, k)
    assert collect_aux_losses(layer)[".switch"].item() == pytest.approx(expected, rel=1e-5)


def load_balance(routing: Routing) -> Tensor:
    layer = make_layer("softmax", 1.0, 4)
    inputs = LossInput(torch.zeros(len(routing.gates), 4), routing, layer.router, layer.bank)
    return layer.losses[0](inputs)


def routing_of(logits: Tensor) -> Routing:
    gates = logits.softmax(dim=1)
    return Routing(gates, logits, gates, torch.ones(logits.shape[1], dtype=torch.bool))


def test_one_at_perfect_balance_and_the_number_of_experts_at_collapse():
    even = routing_of(5 * torch.eye(4).repeat(3, 1))
    assert load_balance(even).item() == pytest.approx(1)
    collapsed = routing_of(torch.tensor([[50.0, 0, 0, 0]] * 6))
    assert load_balance(collapsed).item() == pytest.approx(4)


@pytest.mark.parametrize("router", ROUTERS)
def test_descent_on_the_loss_balances_the_router(router):
    layer = make_layer(router, 1.0)
    x = torch.randn(64, 4) + 1
    with torch.no_grad():
        layer.router.weight[0] = 1.0  # most samples go to expert 0
    optimizer = torch.optim.SGD(layer.router.parameters(), 0.5)
    losses = []
    for _ in range(20):
        layer(x)
        loss = collect_aux_losses(layer)[".switch"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.router.weight.grad[:3].any() and layer.bank.w_in.grad is None
    assert losses[-1] < losses[0] - 0.1


def test_aux_losses_are_named_by_layer_and_weighted():
    first, second, third = (make_layer("cosine", w) for w in (0.5, 0.0, 2.0))
    model = nn.Sequential(first, nn.Sequential(second, third))
    assert collect_aux_losses(model) == {}  # before any forward pass
    model(torch.randn(9, 4))
    losses = collect_aux_losses(model)
    assert losses.keys() == {"0.switch", "1.1.switch"}
    for name, layer in (("0", first), ("1.1", third)):
        expected = layer.losses[0].weight * load_balance(layer.last_routing)
        assert torch.equal(losses[f"{name}.switch"], expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_zero_weight_gives_no_loss(router):
    layer = make_layer(router, 0.0)
    layer(torch.randn(9, 4))
    assert collect_aux_losses(layer) == {}

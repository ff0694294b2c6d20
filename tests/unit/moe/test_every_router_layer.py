"""Every registered router inside a layer that trains, grows and is compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from router_cases import DIM
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, collect_aux_losses, routing_inputs, routing_stats

WIDTH, UNITS, ROOM = 4, 24, 5
every_router = pytest.mark.parametrize("name", registry.names("router"))


def make_layer(name: str, experts: int = 2) -> MoELayer:
    config = registry.get("router", name).Config()
    return MoELayer(DIM, WIDTH, UNITS, num_experts=experts, max_experts=ROOM, router=config)


def objective(layer: MoELayer, y: Tensor) -> Tensor:
    """A regression target, and the losses that the router asks for."""
    target = torch.sin(3 * torch.arange(y.numel())).view_as(y)
    return (y - target).square().mean() + sum(collect_aux_losses(layer).values())


@pytest.mark.parametrize("name", [n for n in registry.names("router") if n != "slots"])
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
def test_output_is_the_experts_mixed_by_the_gates(name, gate_scale):
    """Not so with slots, whose experts see mixtures of tokens."""
    layer = make_layer(name, 3).double().eval()
    layer.gate_scale = gate_scale
    x = torch.randn(10, DIM, dtype=torch.double)
    y, routing = layer(x, context=torch.arange(10)), layer.last_routing
    expected = torch.zeros_like(y)
    for n in range(10):
        used = 3 if routing.chosen is None else int(routing.chosen[n].sum())
        scale = used if gate_scale == "experts" and layer.router.normalised else 1
        for e in range(3):
            units = layer.bank.segment == e
            hidden = torch.relu(layer.bank.w_in[units] @ x[n] + layer.bank.b_in[units])
            said = layer.bank.w_out[:, units] @ hidden + layer.bank.b_out[e]
            expected[n] += scale * routing.gates[n, e] * said
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@every_router
@pytest.mark.parametrize("init", ["random", "duplicate"])
def test_growth_in_the_middle_of_training(name, init):
    layer = make_layer(name)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    init_config = registry.get("init", init).Config()
    controller = GrowthController(layer, optimizer, granularity=2, init=init_config)
    x, context = torch.randn(32, DIM), torch.arange(32) % 7
    losses, grown_rows = [], layer.router.weight.detach().clone()
    for phase in range(2):
        if phase:
            with routing_inputs(layer, context=context):
                event = controller.grow(3, (x, None))
            assert event.experts == 4 and 0 <= event.shock["output_change"] < torch.inf
            grown_rows = layer.router.weight.detach().clone()
        for _ in range(3):
            loss = objective(layer, layer(x, context=context))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            assert all(p.isfinite().all() for p in layer.parameters())
    assert all(0 < value < 100 for value in losses) and len(set(losses)) == 6
    assert layer.last_routing.active.tolist() == [True] * 4 + [False]
    assert routing_stats(layer)[""]["used_experts"] >= 1
    moved = (layer.router.weight != grown_rows).any(dim=1)
    if layer.router.weight.requires_grad:
        assert moved.tolist() == [True] * 4 + [False]


@every_router
def test_sequences_with_padding(name):
    layer = make_layer(name, 3)
    x, mask = (
        torch.randn(4, 6, DIM),
        torch.arange(6).expand(4, 6) < torch.tensor([[6], [3], [1], [0]]),
    )
    context = torch.arange(24).view(4, 6)
    y = layer(x, mask, context)
    assert y.shape == (4, 6, WIDTH) and y.isfinite().all()
    assert not y[~mask].any() and not layer.last_routing.gates[~mask.flatten()].any()
    objective(layer, y).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@every_router
@pytest.mark.thin(8)
def test_one_graph_through_training_and_growth(name):
    torch._dynamo.reset()
    layer = make_layer(name)
    optimizer = torch.optim.Adam(layer.parameters())
    pruning = registry.get("pruning", "random").Config()
    controller, counter = GrowthController(layer, optimizer, pruning=pruning), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, context = torch.randn(9, DIM), torch.arange(9) % 3
    for growth in range(4):
        if growth:
            controller.grow(growth)
        eager = copy.deepcopy(layer)
        with torch._dynamo.config.patch(error_on_recompile=growth > 0):
            y = compiled(x, context=context)
        torch.testing.assert_close(y, eager(x, context=context))
        torch.testing.assert_close(layer.last_losses, eager.last_losses)
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())
        loss = objective(layer, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.num_experts == 5 and counter.frame_count == 1

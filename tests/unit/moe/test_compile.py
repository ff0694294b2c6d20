"""torch.compile on the dense path: one graph, kept through every growth.

Dynamo traces for real; the "eager" backend runs the traced graph without compiling kernels, which
takes seconds instead of minutes and hides nothing that we assert.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, collect_aux_losses
from dynmoe.moe.losses.balance import SwitchLoss


@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize("router", ["cosine", "softmax"])
def test_ten_growths_keep_one_graph(router, gate_scale, device):
    torch._dynamo.reset()
    layer = MoELayer(
        6,
        5,
        40,
        num_experts=2,
        max_experts=12,
        router=registry.get("router", router).Config(),
        gate_scale=gate_scale,
        losses=(SwitchLoss.Config(weight=0.1),),
    ).to(device)
    optimizer = torch.optim.Adam(layer.parameters())
    pruning = registry.get("pruning", "random").Config()
    controller = GrowthController(layer, optimizer, pruning=pruning)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(7, 6, device=device)
    for growth in range(11):
        if growth:
            controller.grow(growth)
        with torch._dynamo.config.patch(error_on_recompile=growth > 0):
            y = compiled(x)
        routing = layer.last_routing
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(routing.gates, layer.last_routing.gates)
        layer.last_routing = routing
        loss = y.square().sum() + sum(collect_aux_losses(layer).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert layer.router.weight.grad[: layer.num_experts].any(dim=1).all()
    assert layer.num_experts == 12
    assert counter.frame_count == 1

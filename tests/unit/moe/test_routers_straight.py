"""The straight-through router, and what normalisations ask of the layer and the affine bank."""

from __future__ import annotations

import torch
from router_cases import DIM, make_router, samples

from dynmoe.moe import MoELayer
from dynmoe.moe.experts.rows import AffineBank
from dynmoe.moe.routers.top1 import StraightThroughRouter


def trained(experts: int = 3) -> StraightThroughRouter:
    router = make_router("straight-through", experts)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    return router


def test_the_gate_is_one_and_its_gradient_that_of_log_p():
    router, x, g = trained(), samples(9), torch.randn(9, dtype=torch.double)
    routing = router(x)
    assert set(routing.gates.flatten().tolist()) == {0.0, 1.0}
    (routing.gates.sum(dim=1) * g).sum().backward()
    got = [router.weight.grad.clone(), router.bias.grad.clone()]
    router.zero_grad()
    for row, factor in zip(x, g, strict=True):
        scores = [router.weight[e] @ row + router.bias[e] for e in range(3)]
        best = max(range(3), key=lambda e: scores[e])
        log_p = scores[best] - torch.stack(scores).logsumexp(0)
        (factor * log_p).backward()
    torch.testing.assert_close(got, [router.weight.grad, router.bias.grad], rtol=1e-12, atol=1e-12)


def test_an_expert_of_probability_0_that_is_chosen_all_the_same():
    router = trained()
    with torch.no_grad():
        router.bias[0] = -1e4
    router.selection_bias[0] = 1e5
    routing = router(samples(4))
    assert routing.chosen[:, 0].all() and not routing.probabilities[:, 0].any()
    (routing.gates * samples(4)[:, :5]).sum().backward()
    assert router.weight.grad.isfinite().all() and (routing.gates[:, 0] == 1).all()


def test_fresh_rows_are_xavier_normal_with_bias_0():
    config, generator = StraightThroughRouter.Config(), torch.Generator().manual_seed(0)
    router = config.build(300, 4, 700, generator)
    assert abs(float(router.weight.detach().std()) / (2 / 1000) ** 0.5 - 1) < 0.01
    torch.nn.init.ones_(router.bias)
    router.draw_rows(torch.tensor([5]), generator)
    assert router.bias[5] == 0 and router.bias.sum() == 699


def test_samples_are_routed_by_what_the_layer_is_shown():
    options = {"router": StraightThroughRouter.Config(), "bank": AffineBank.Config(init_scale=1.0)}
    layer = MoELayer(DIM, DIM, 4, num_experts=4, **options).double()
    x, seen = torch.randn(8, 3, DIM, dtype=torch.double), samples(8)
    layer(x, routing_input=seen)
    expert = layer.last_routing.gates.argmax(dim=1)
    assert torch.equal(expert, (seen @ layer.router.weight.T).argmax(dim=1))
    assert not torch.equal(expert, (x.mean(1) @ layer.router.weight.T).argmax(dim=1))


def test_affine_experts_may_stand_on_a_frozen_scale_and_shift():
    layer = MoELayer(DIM, DIM, 4, num_experts=4, bank=AffineBank.Config(init_scale=1.0)).double()
    x, gamma, beta = torch.randn(8, 3, DIM, dtype=torch.double), samples(1)[0], samples(1)[0]
    alone, count = layer(x), sum(p.numel() for p in layer.parameters())
    layer.bank.stand_on(gamma, beta)
    torch.testing.assert_close(layer(x), alone + x * gamma + beta, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == count
    assert {"bank.base_gamma", "bank.base_beta"} <= set(layer.state_dict())

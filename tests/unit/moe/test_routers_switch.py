"""The routers of one expert per sample, against their formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import DIM, make_router, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, Router

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def naive_switch(
    router: Router, x: Tensor, experts: int, factor: float, real: list[bool]
) -> Tensor:
    """[N, 5] gates, one sample after the other."""
    gates = torch.zeros(len(x), 5, dtype=torch.double)
    capacity = math.ceil(factor * sum(real) / experts - 1e-9) if factor else len(x)
    taken, weight = [0] * experts, router.weight.detach()
    for n, row in enumerate(x):
        scores = [float(row @ weight[e]) for e in range(experts)]
        best = max(range(experts), key=lambda e: scores[e])
        if real[n] and taken[best] < capacity:
            taken[best] += 1
            gates[n, best] = 1 / sum(math.exp(s - scores[best]) for s in scores)
    return gates


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    n=st.integers(1, 25),
    factor=st.sampled_from([0.0, 0.3, 1.0, 1.25, 10.0]),
    masked=st.booleans(),
)
def test_switch_equals_a_loop_over_samples(seed, experts, n, factor, masked):
    torch.manual_seed(seed)
    router = make_router("switch", experts, seed=seed, capacity_factor=factor).eval()
    x = samples(n)
    mask = torch.rand(n) < 0.6 if masked else None
    real = [True] * n if mask is None else mask.tolist()
    routing = router(x, mask)
    expected = naive_switch(router, x, experts, factor, real)
    torch.testing.assert_close(routing.gates, expected, **EXACT)
    assert torch.equal(routing.chosen, expected > 0)


def test_full_experts_drop_the_samples_that_come_last():
    router, x = make_router("switch", 2, jitter=0, capacity_factor=1.0), samples(8)
    with torch.no_grad():
        router.weight[0], router.weight[1] = x[0], -x[0]
    x = x[:1].repeat(8, 1)  # all want expert 0, which takes 8 / 2
    assert router(x).chosen[:, 0].tolist() == [True] * 4 + [False] * 4
    mask = torch.arange(8) % 2 == 1  # the real ones are 4, and the expert takes 2 of them
    assert router(x, mask).chosen[:, 0].nonzero().flatten().tolist() == [1, 3]
    router.active[2] = True  # growth lowers the capacity with the next batch
    router.weight.data[2] = 0
    assert router(x).chosen[:, 0].sum() == 3


def test_dropped_samples_leave_the_layer_with_zero():
    config = type(make_router("switch")).Config(capacity_factor=0.5)
    layer = MoELayer(DIM, 4, 8, num_experts=2, router=config).double().eval()
    y, chosen = layer(samples(20)), layer.last_routing.chosen
    dropped = ~chosen.any(dim=1)
    assert dropped.sum() >= 10 and not y[dropped].any() and y[~dropped].any(dim=1).all()


def test_jitter_multiplies_what_the_router_sees():
    router, x = make_router("switch", jitter=0.3), samples(4000)
    uniform = copy.deepcopy(router.noise).uniform(x)
    factor = 0.7 + 0.6 * uniform
    expected = (x * factor) @ router.weight[:3].T
    torch.testing.assert_close(router(x).logits[:, :3], expected, **EXACT)
    assert factor.amin() >= 0.7 and factor.amax() <= 1.3
    assert (router(x).logits[:, :3] != expected).all()  # re-initialised
    torch.testing.assert_close(router.eval()(x).logits[:, :3], x @ router.weight[:3].T, **EXACT)


def test_switch_gate_teaches_the_router():
    router, x = make_router("switch", jitter=0, capacity_factor=0.8), samples(30)
    router(x).gates.sum().backward()
    assert (router.weight.grad[:3].norm(dim=1) > 1e-2).all()


@pytest.mark.parametrize("name", ["switch", "cost-aware"])
def test_gradcheck(name):
    router = make_router(name)
    draws = router.noise.drawn.clone() if name == "switch" else None
    sizes = torch.tensor([1, 4, 2, 1, 1])

    def function(x: Tensor, weight: Tensor) -> Tensor:
        state = {"weight": weight}
        if draws is not None:
            state["noise.drawn"] = draws.clone()
        return torch.func.functional_call(router, state, x, {"sizes": sizes}).gates

    assert torch.autograd.gradcheck(function, (samples(6).requires_grad_(), router.weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": -0.1}, "jitter=-0.1 must be at least 0, below 1"),
        ({"jitter": 1.0}, "jitter=1.0 must be at least 0, below 1"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be at least 0"),
    ],
)
def test_bad_switch_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_router("switch", **options)


# cost ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    cost_weight=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
)
def test_cost_aware_equals_a_loop_over_samples(seed, experts, cost_weight, sizes):
    torch.manual_seed(seed)
    router = make_router("cost-aware", experts, seed=seed, cost_weight=cost_weight)
    x = samples(15)
    routing, weight = router(x, sizes=torch.tensor(sizes)), router.weight.detach()
    mean = sum(sizes[:experts]) / experts
    for n, row in enumerate(x):
        scores = [float(row @ weight[e]) for e in range(experts)]
        best = max(range(experts), key=lambda e: scores[e] - cost_weight * sizes[e] / mean)
        gate = math.exp(scores[best]) / sum(map(math.exp, scores))
        expected = [gate if e == best else 0.0 for e in range(5)]
        torch.testing.assert_close(routing.gates[n].tolist(), expected, **EXACT)


def test_a_high_price_leaves_the_smallest_expert_only():
    config = type(make_router("cost-aware")).Config(cost_weight=100.0)
    layer = MoELayer(DIM, 4, 12, num_experts=3, max_experts=5, router=config).double()
    layer.bank.set_hidden_sizes([5, 1, 6])
    layer(samples(30))
    assert layer.last_routing.chosen.sum(dim=0).tolist() == [0, 30, 0, 0, 0]
    layer.bank.set_hidden_sizes([4, 4, 4])
    layer(samples(30))
    assert layer.last_routing.chosen.any(dim=0).tolist() == [True, True, True, False, False]


def test_cost_aware_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="experts have no sizes; choose a bank of hidden units"):
        make_router("cost-aware")(samples(3))
    with pytest.raises(UserError, match="cost_weight=-1.0 must be at least 0"):
        make_router("cost-aware", cost_weight=-1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("switch", {"capacity_factor": 1.1, "jitter": 0}),
        ("expert-choice", {"capacity": 1.1}),
        ("maxscore", {"capacity": 1.1, "k": 1}),
    ],
)
def test_a_capacity_that_is_a_whole_number_is_not_rounded_up(name, options):
    """1.1 * 100 / 10 is 11; in floats it is a little more."""
    router = make_router(name, 10, room=10, **options)
    with torch.no_grad():
        router.weight[0] += 20.0
    assert router(samples(100).abs()).chosen.sum(dim=0).max() == 11

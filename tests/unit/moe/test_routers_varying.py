"""The routers that give each sample its own number of experts, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import DIM, make_router, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import Router

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def probabilities_of(router: Router, row: Tensor, experts: int) -> list[float]:
    """Softmax over the active experts, for one sample."""
    scores = [float(row @ router.weight[e].detach()) for e in range(experts)]
    total = sum(math.exp(s - max(scores)) for s in scores)
    return [math.exp(s - max(scores)) / total for s in scores]


def gates_of(p: list[float], chosen: list[int], renormalise: bool) -> list[float]:
    """Gates of one sample, 5 wide; an expert alone keeps its probability."""
    total = sum(p[e] for e in chosen) if renormalise and len(chosen) > 1 else 1.0
    return [p[e] / total if e in chosen else 0.0 for e in range(5)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    p=st.sampled_from([0.01, 0.4, 0.7, 0.95, 1.0]),
    scale=st.sampled_from([0.5, 3.0]),
    renormalise=st.booleans(),
)
def test_top_p_equals_a_loop_over_samples(seed, experts, p, scale, renormalise):
    torch.manual_seed(seed)
    router = make_router("top-p", experts, seed=seed, p=p, renormalise=renormalise)
    x = samples(12, scale)
    routing = router(x)
    for n, row in enumerate(x):
        share = probabilities_of(router, row, experts)
        chosen, total = [], 0.0
        for e in sorted(range(experts), key=lambda e: -share[e]):
            if total < p - 1e-15:
                chosen.append(e)
                total += share[e]
        expected = gates_of(share, chosen, renormalise)
        torch.testing.assert_close(routing.gates[n].tolist(), expected, **EXACT)
        assert routing.chosen[n].nonzero().flatten().tolist() == sorted(chosen)


def test_top_p_set_is_the_smallest_one():
    router, x = make_router("top-p", 5, p=0.8), samples(200, 2.0)
    routing = router(x)
    kept = torch.where(routing.chosen, routing.probabilities, torch.inf)
    total = torch.where(routing.chosen, routing.probabilities, 0.0).sum(dim=1)
    assert (total >= 0.8).all() and (total - kept.amin(dim=1) < 0.8).all()
    assert set(routing.used().flatten().tolist()) >= {1, 2, 3}


@pytest.mark.parametrize(("p", "count"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.75, 3), (1.0, 4)])
def test_top_p_takes_older_experts_first_where_all_are_equal(p, count):
    router, x = make_router("top-p", 4, p=p), torch.zeros(3, DIM, dtype=torch.double)
    assert router(x).chosen.tolist() == [[e < count for e in range(5)]] * 3


def test_top_p_uses_the_selection_bias_for_the_order_alone():
    router, x = make_router("top-p", 3, p=0.1), samples(20)
    before = router(x)
    assert not before.chosen[:, 2].all()
    router.selection_bias[2] = 50.0
    after = router(x)
    assert after.chosen[:, 2].all()
    enough = before.probabilities[:, 2] >= 0.1
    assert (after.used().flatten() == 1).tolist() == enough.tolist() and enough.any()
    torch.testing.assert_close(after.probabilities, before.probabilities)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    k_max=st.integers(1, 5),
    tau=st.sampled_from([0.01, 0.7, 1.5, 100.0]),
)
def test_norm_equals_a_loop_over_samples(seed, experts, k_max, tau):
    torch.manual_seed(seed)
    router = make_router("norm", experts, seed=seed, k_max=k_max, tau=tau)
    x = samples(12)
    routing = router(x)
    for n, row in enumerate(x):
        count = max(1, min(k_max, math.floor(tau * math.sqrt(sum(v * v for v in row.tolist())))))
        share = probabilities_of(router, row, experts)
        chosen = sorted(range(experts), key=lambda e: -share[e])[:count]
        expected = gates_of(share, chosen, renormalise=True)
        torch.testing.assert_close(routing.gates[n].tolist(), expected, **EXACT)


def test_longer_samples_use_more_experts():
    router = make_router("norm", 4, k_max=3, tau=1.0)
    x = samples(1) / samples(1).norm()
    x = x / x.norm() * torch.tensor([[0.0], [0.9], [1.5], [2.5], [3.5], [99.0]])
    assert router(x).used().flatten().tolist() == [1, 1, 1, 2, 3, 3]
    router.active[2:] = False  # fewer live than a sample could use
    assert router(x).used().flatten().tolist() == [1, 1, 1, 2, 2, 2]


def test_norm_uses_the_selection_bias_for_the_choice_alone():
    router, x = make_router("norm", 3, k_max=1), samples(20)
    before = router(x).probabilities
    router.selection_bias[1] = 50.0
    routing = router(x)
    assert routing.chosen.tolist() == [[False, True, False, False, False]] * 20
    torch.testing.assert_close(routing.gates[:, 1], before[:, 1])


@pytest.mark.parametrize("name", ["top-p", "norm"])
def test_an_expert_alone_teaches_the_router(name):
    options = {"p": 0.01} if name == "top-p" else {"k_max": 1}
    router = make_router(name, **options)
    routing = router(samples(30))
    assert (routing.used() == 1).all()
    routing.gates.sum().backward()
    assert (router.weight.grad[:3].norm(dim=1) > 1e-2).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("top-p", {"p": 0.7}),
        ("top-p", {"p": 0.7, "renormalise": False}),
        ("norm", {"k_max": 3}),
    ],
)
def test_gradcheck(name, options):
    router = make_router(name, 4, **options)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(router, {"weight": weight}, x).gates

    assert torch.autograd.gradcheck(function, (samples(6).requires_grad_(), router.weight))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top-p", {"p": 0.0}, "p=0.0 must be above 0, at most 1"),
        ("top-p", {"p": 1.5}, "p=1.5 must be above 0, at most 1"),
        ("norm", {"k_max": 0}, "k_max=0 must be between 1 and 5"),
        ("norm", {"k_max": 6}, "k_max=6 must be between 1 and 5"),
        ("norm", {"tau": 0.0}, "tau=0.0 must be above 0"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        make_router(name, **options)

"""Every router against its contract, and the registered ones against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import Router, Routing

ROUTERS = ("cosine", "softmax", "topk")


def make_router(name: str, experts: int = 3, room: int = 5, seed: int = 0, **options) -> Router:
    generator = torch.Generator().manual_seed(seed)
    config = registry.get("router", name).Config(**options)
    return config.build(6, experts, room, generator).double()


def samples(n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, 6, dtype=torch.double)


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    n=st.integers(1, 20),
    log_scale=st.floats(-3, 3),
)
def test_gates_are_weights_of_living_experts(name, seed, experts, n, log_scale):
    torch.manual_seed(seed)
    router = make_router(name, experts, seed=seed)
    routing: Routing = router(samples(n, 10**log_scale))
    assert routing.gates.shape == routing.logits.shape == routing.probabilities.shape == (n, 5)
    assert routing.alive.tolist() == [e < experts for e in range(5)]
    assert (routing.gates >= 0).all()
    torch.testing.assert_close(routing.gates.sum(dim=1), torch.ones(n, dtype=torch.double))
    assert not routing.gates[:, experts:].any() and not routing.probabilities[:, experts:].any()
    assert (routing.logits[:, experts:] == -torch.inf).all()
    assert routing.logits[:, :experts].isfinite().all()
    torch.testing.assert_close(routing.probabilities, routing.logits.softmax(dim=1))
    if routing.chosen is None:
        assert torch.equal(routing.gates, routing.probabilities)
    else:
        assert not routing.chosen[:, experts:].any()
        assert not routing.gates[~routing.chosen].any()


@pytest.mark.parametrize("name", ROUTERS)
def test_logit_shift_is_added_to_the_logits(name):
    router, x = make_router(name), samples(9)
    before = router(x).logits
    router.logit_shift[:3] = torch.tensor([0.0, math.log(2), -1.5])
    routing = router(x)
    torch.testing.assert_close(routing.logits, before + router.logit_shift)
    odds = routing.probabilities[:, 1] / routing.probabilities[:, 0]
    torch.testing.assert_close(odds, 2 * (before[:, 1] - before[:, 0]).exp())


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_rows_shifted_by_log_half_share_one_gate(name):
    """Why duplicating experts can preserve the function."""
    router, x = make_router(name), samples(9)
    before = router(x).probabilities
    with torch.no_grad():
        router.weight[3] = router.weight[1]
    router.alive[3] = True
    router.logit_shift[[1, 3]] = -math.log(2)
    after = router(x).probabilities
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]])
    torch.testing.assert_close(after[:, [1, 3]], before[:, [1, 1]] / 2)


@pytest.mark.parametrize("name", ROUTERS)
def test_drawing_rows_leaves_the_others_alone(name):
    router = make_router(name)
    before = router.weight.detach().clone()
    router.logit_shift[:] = 1.0
    router.draw_rows(torch.tensor([1, 4]), torch.Generator().manual_seed(9))
    assert (router.weight != before).any(dim=1).tolist() == [False, True, False, False, True]
    assert router.logit_shift.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert any(p is router.weight for p in router.expert_rows())


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_softmax_router_is_a_softmax_of_a_linear_map(temperature):
    router, x = make_router("softmax", temperature=temperature), samples(9)
    scores = (x @ router.weight[:3].T / temperature).exp()
    expected = scores / scores.sum(dim=1, keepdim=True)
    torch.testing.assert_close(router(x).gates[:, :3], expected)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_cosine_router_knows_directions_only(temperature):
    router, x = make_router("cosine", temperature=temperature), samples(9)
    gates = router(x).gates
    cosine = torch.cosine_similarity(x[:, None], router.weight[None, :3], dim=2)
    torch.testing.assert_close(gates[:, :3], (cosine / temperature).softmax(dim=1))
    torch.testing.assert_close(router(100 * x).gates, gates)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 5))
def test_cosine_gates_stay_within_a_fixed_ratio(seed, temperature):
    router = make_router("cosine", 5, seed=seed, temperature=temperature)
    with torch.no_grad():
        router.weight[1] = -7 * router.weight[0]  # the extreme case: opposite prototypes
    x = torch.cat([samples(20, 50.0), router.weight.detach()])
    ratio = router(x).gates
    ratio = ratio.amin(dim=1) / ratio.amax(dim=1)
    bound = math.exp(-2 / temperature)
    assert (ratio >= bound * (1 - 1e-9)).all()
    assert ratio.min().item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_takes_the_most_probable_experts(k):
    router, x = make_router("topk", 4, k=k), samples(30)
    probabilities = (x @ router.weight[:4].T).softmax(dim=1)
    routing = router(x)
    assert (routing.chosen.sum(dim=1) == k).all()
    for row, p, gates in zip(routing.chosen, probabilities, routing.gates, strict=True):
        best = p.sort(descending=True).indices[:k]
        assert row.nonzero().flatten().tolist() == sorted(best.tolist())
        assert torch.equal(gates > 0, row)
        torch.testing.assert_close(gates[best], p[best] / (p[best].sum() if k > 1 else 1))


def test_top1_gate_is_the_probability_and_teaches_the_router():
    """Renormalised, it would be 1 and the router's gradient zero."""
    router, x = make_router("topk", k=1), samples(30)
    routing = router(x)
    torch.testing.assert_close(routing.gates.sum(dim=1), routing.probabilities.amax(dim=1))
    (routing.gates.sum(dim=1) * torch.randn(30)).sum().backward()
    assert (router.weight.grad[:3].norm(dim=1) > 1e-2).all()


def test_topk_uses_all_while_fewer_live():
    router, x = make_router("topk", 2, k=4), samples(8)
    routing = router(x)
    assert routing.chosen.tolist() == [[True, True, False, False, False]] * 8
    torch.testing.assert_close(routing.gates, routing.probabilities)
    router.alive[2:4] = True
    assert (router(x).chosen.sum(dim=1) == 4).all()


def test_topk_leaves_unborn_experts_out_where_probabilities_underflow():
    router, x = make_router("topk", 3, k=3).float(), samples(50, 1e4).float()
    routing = router(x)
    assert (routing.probabilities[:, :3] == 0).any()
    assert routing.chosen.sum(dim=0).tolist() == [50, 50, 50, 0, 0]


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_bad_k_is_refused(k):
    with pytest.raises(UserError, match=f"k={k} must be between 1 and 5"):
        make_router("topk", k=k)


@pytest.mark.parametrize("name", ["softmax", "cosine"])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_bad_temperature_is_refused(name, temperature):
    with pytest.raises(UserError, match="must be above 0"):
        make_router(name, temperature=temperature)

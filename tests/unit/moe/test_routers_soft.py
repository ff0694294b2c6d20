"""The plain dense routers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import make_router, samples

from dynmoe.errors import UserError


@pytest.mark.parametrize("name", ["softmax", "cosine"])
def test_logit_shift_is_added_to_the_logits(name):
    router, x = make_router(name), samples(9)
    before = router(x).logits
    router.logit_shift[:3] = torch.tensor([0.0, math.log(2), -1.5])
    routing = router(x)
    torch.testing.assert_close(routing.logits, before + router.logit_shift)
    torch.testing.assert_close(routing.probabilities, routing.logits.softmax(dim=1))


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


@pytest.mark.parametrize("name", ["softmax", "cosine"])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_bad_temperature_is_refused(name, temperature):
    with pytest.raises(UserError, match="must be above 0"):
        make_router(name, temperature=temperature)

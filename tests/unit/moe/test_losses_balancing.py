"""Balancing losses against their formulas: importance, load, z, information, similarity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_tools import (
    close,
    given_by,
    given_routing,
    loss_of,
    make_layer,
    make_loss,
    samples,
)

from dynmoe.errors import UserError
from dynmoe.moe import MoELayer

ROUTERS = ("cosine", "softmax", "topk")  # dense and sparse


def cv2(values: list[float]) -> float:
    """Squared coefficient of variation with the unbiased variance."""
    if len(values) == 1:
        return 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance / (mean**2 + 1e-10)


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("router", ROUTERS)
def test_importance_is_the_variation_of_summed_gates(router, experts):
    layer, x = make_layer(router, experts), samples()
    sums = [0.0] * experts
    for row in layer.router(x).gates.tolist():
        sums = [s + g / len(x) for s, g in zip(sums, row, strict=False)]
    close(loss_of("importance", layer, x), cv2(sums))


def test_importance_is_0_when_even_and_the_number_of_experts_at_collapse():
    layer = make_layer(experts=4)
    even = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]] * 7).double()
    close(make_loss("importance")(given_routing(layer, gates=even)), 0.0)
    collapsed = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]] * 7).double()
    loss = make_loss("importance")(given_routing(layer, gates=collapsed))
    assert loss.item() == pytest.approx(4.0, rel=1e-8)


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_load_is_the_variation_of_the_smooth_load(experts):
    layer, x = make_layer("noisy-topk", experts), samples()
    inputs = given_by(layer, x)
    sums = [0.0] * experts
    for row in inputs.routing.load.tolist():
        sums = [s + p / len(x) for s, p in zip(sums, row, strict=False)]
    close(make_loss("load")(inputs), cv2(sums))
    assert experts == 1 or sums != [sums[0]] * experts


@pytest.mark.parametrize("router", ["cosine", "topk"])
def test_load_without_a_noisy_router_is_refused_in_one_line(router):
    message = f"load loss: router '{router}' gives no smooth load; take a noisy one"
    with pytest.raises(UserError, match=message) as error:
        loss_of("load", make_layer(router), samples())
    assert "\n" not in str(error.value)


def test_load_reaches_tokens_that_are_routed_by_sample():
    config = make_layer("noisy-topk").router
    layer = MoELayer(
        4, 3, 12, num_experts=3, max_experts=5, router=config, route_per="sample",
        losses=(type(make_loss("load")).Config(weight=1.0),),
    ).double()  # fmt: skip
    layer(torch.randn(6, 2, 4, dtype=torch.double))
    load = layer.last_routing.load.mean(dim=0)[:3].tolist()
    close(layer.last_losses["load"], cv2(load))


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("router", ROUTERS)
def test_z_is_the_mean_squared_log_of_the_partition_function(router, experts):
    layer, x = make_layer(router, experts), samples()
    squares = [
        math.log(math.fsum(math.exp(v) for v in row[:experts])) ** 2
        for row in layer.router(x).logits.tolist()
    ]
    close(loss_of("z", layer, x), math.fsum(squares) / len(squares))


def plogp(p: list[float]) -> float:
    return -math.fsum(v * math.log(v) for v in p if v > 0)


@pytest.mark.parametrize(("marginal", "conditional"), [(1.0, 1.0), (1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("experts", [1, 3, 5])
@pytest.mark.parametrize("router", ROUTERS)
def test_information_is_the_difference_of_two_entropies(router, experts, marginal, conditional):
    layer, x = make_layer(router, experts), samples()
    rows = layer.router(x).probabilities.tolist()
    mean = [math.fsum(row[e] for row in rows) / len(rows) for e in range(experts)]
    inner = math.fsum(plogp(row) for row in rows) / len(rows)
    loss = loss_of("mutual-information", layer, x, marginal=marginal, conditional=conditional)
    close(loss, conditional * inner - marginal * plogp(mean))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), log_scale=st.floats(-2, 3))
def test_information_lies_between_0_and_log_of_the_experts(seed, n, log_scale):
    torch.manual_seed(seed)
    loss = loss_of("mutual-information", make_layer("softmax"), samples(n, 10**log_scale))
    assert -math.log(3) - 1e-9 <= loss.item() <= 1e-9


def test_information_of_sure_even_samples_is_full():
    layer = make_layer(experts=4)
    sure = torch.eye(5, dtype=torch.double)[:4].repeat(3, 1)
    loss = make_loss("mutual-information")(given_routing(layer, probabilities=sure))
    close(loss, -math.log(4))


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_similarity_is_the_sum_of_absolute_gaps_to_the_identity(experts):
    layer = make_layer("topk", experts)
    rows, total = layer.router.weight.tolist(), 0.0
    for i in range(experts):
        for j in range(experts):
            product = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            total += abs(product - (i == j))
    close(loss_of("similarity", layer, samples()), total)


def test_similarity_is_0_for_orthonormal_rows_alone():
    layer = make_layer("topk", 4)
    with torch.no_grad():
        layer.router.weight[:4] = torch.linalg.qr(samples(4)).Q
    close(loss_of("similarity", layer, samples()), 0.0)


@pytest.mark.parametrize("form", ["euclidean", "cosine", "kl"])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_prototype_diversity_is_the_mean_similarity_of_two_rows(experts, form):
    layer = make_layer("topk", experts)
    rows, total = layer.router.weight.tolist(), 0.0
    for k in range(experts):
        for j in range(experts):
            if k != j:
                total += similarity(rows[k], rows[j], form)
    expected = total / (experts * (experts - 1)) if experts > 1 else 0.0
    close(loss_of("prototype-diversity", layer, samples(), form=form), expected)


def similarity(a: list[float], b: list[float], form: str) -> float:
    if form == "euclidean":
        return math.exp(-math.dist(a, b))
    if form == "cosine":
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        return max(0.0, dot / math.hypot(*a) / math.hypot(*b))
    p, q = ([math.exp(v) / math.fsum(map(math.exp, r)) for v in r] for r in (a, b))
    gaps = [(x - y) * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True)]
    return math.exp(-0.5 * math.fsum(gaps))


@pytest.mark.parametrize("form", ["euclidean", "cosine", "kl"])
def test_equal_prototypes_have_similarity_1_and_no_nan(form):
    layer = make_layer("topk", 3)
    with torch.no_grad():
        layer.router.weight[:] = layer.router.weight[0].clone()
    loss = loss_of("prototype-diversity", layer, samples(), form=form)
    close(loss, 1.0)
    loss.backward()
    assert layer.router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mutual-information", {"marginal": -1.0}, "marginal=-1.0 must be at least 0"),
        ("mutual-information", {"conditional": -0.1}, "conditional=-0.1 must be at least 0"),
        ("prototype-diversity", {"form": "l1"}, "form='l1' must be one of euclidean, cosine, kl"),
        ("z", {"weight": -1.0}, "z loss: weight=-1.0 must be at least 0"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        make_loss(name, **options)

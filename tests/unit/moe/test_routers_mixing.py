"""Routers whose tokens compete or mix: expert choice and slots, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import make_router, samples
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def naive_choice(
    x: Tensor, weight: Tensor, experts: int, groups: int, real: list[bool], capacity: float
) -> Tensor:
    """[N, experts] gates: every expert of every group takes its best tokens, one by one."""
    p = (x @ weight[:experts].T).softmax(dim=1).tolist()
    gates = torch.zeros(len(x), experts, dtype=torch.double)
    size = len(x) // groups
    for group in range(groups):
        tokens = [t for t in range(group * size, (group + 1) * size) if real[t]]
        share = math.ceil(len(tokens) * capacity / experts - 1e-9)
        for e in range(experts):
            for t in sorted(tokens, key=lambda t, e=e: (-p[t][e], t))[:share]:
                gates[t, e] = p[t][e]
    return gates


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 9),
    capacity=st.floats(0.1, 6),
    padded=st.booleans(),
)
def test_each_expert_takes_its_best_tokens(seed, experts, groups, tokens, capacity, padded):
    torch.manual_seed(seed)
    router = make_router("expert-choice", experts, seed=seed, capacity=capacity)
    x = samples(groups * tokens)
    mask = torch.rand(len(x)) < 0.6 if padded else None
    real = mask.tolist() if padded else [True] * len(x)
    routing = router(x, mask=mask, groups=groups)
    expected = naive_choice(x, router.weight, experts, groups, real, capacity)
    torch.testing.assert_close(routing.gates[:, :experts], expected, **EXACT)
    assert torch.equal(routing.chosen[:, :experts], expected > 0)


def test_the_share_is_exact_where_single_precision_would_round_up():
    router = make_router("expert-choice", 2, capacity=1.2).float()  # 25 * 1.2 / 2 = 15
    assert (router(samples(25).float()).chosen.sum(dim=0)[:2] == 15).all()


def test_equal_tokens_go_by_position_and_underflow_does_not_matter():
    router = make_router("expert-choice", 2, capacity=1.0).float()
    chosen = router(torch.ones(6, 6)).chosen
    assert chosen[:, 0].tolist() == chosen[:, 1].tolist() == [True] * 3 + [False] * 3
    with torch.no_grad():
        router.weight[0], router.weight[1] = 0.0, 1.0
    routing = router(torch.tensor([60.0, 50, 40, 30]).unsqueeze(1).expand(4, 6).contiguous())
    assert not routing.probabilities[:, 0].any()
    assert routing.chosen[:, 0].tolist() == [False, False, True, True]


def naive_slots(router, x: Tensor, groups: int, real: list[bool]) -> tuple[Tensor, Tensor]:
    """Dispatch and combine [G, T, S] of the active experts' slots, entry by entry."""
    size, p = len(x) // groups, router.slots
    living = [e for e, lives in enumerate(router.active.tolist()) if lives]
    phi = []
    for e in living:
        rows = [router.weight[e]] + ([] if p == 1 else list(router.others[e]))
        phi += [row / row.norm() for row in rows]
    scores = [[(router.scale * (t / t.norm()) @ f).item() for f in phi] for t in x]
    dispatch = torch.zeros(groups, size, len(phi), dtype=torch.double)
    combine = torch.zeros_like(dispatch)
    for g in range(groups):
        tokens = [t for t in range(size) if real[g * size + t]]
        for t in tokens:
            row = [math.exp(s) for s in scores[g * size + t]]
            for s in range(len(phi)):
                column = sum(math.exp(scores[g * size + u][s]) for u in tokens)
                dispatch[g, t, s] = row[s] / column
                combine[g, t, s] = row[s] / sum(row)
    return dispatch, combine


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 5),
    slots=st.integers(1, 3),
    padded=st.booleans(),
)
def test_slots_are_two_softmaxes_of_one_matrix(seed, experts, groups, tokens, slots, padded):
    torch.manual_seed(seed)
    router = make_router("slots", experts, seed=seed, slots_per_expert=slots)
    with torch.no_grad():
        router.scale.fill_(2.5)
    x = samples(groups * tokens)
    mask = torch.rand(len(x)) < 0.6 if padded else None
    real = mask.tolist() if padded else [True] * len(x)
    routing = router(x, mask=mask, groups=groups)
    dispatch, combine = naive_slots(router, x, groups, real)
    given, used = routing.slots, experts * slots
    assert given.owner.tolist() == [e for e in range(5) for _ in range(slots)]
    assert given.used.tolist() == [e < experts for e in given.owner.tolist()]
    torch.testing.assert_close(given.dispatch[..., :used], dispatch, **EXACT)
    torch.testing.assert_close(given.combine[..., :used], combine, **EXACT)
    assert not given.dispatch[..., used:].any() and not given.combine[..., used:].any()
    shares = combine.flatten(0, 1).unflatten(1, (experts, slots)).sum(dim=2)
    torch.testing.assert_close(routing.gates[:, :experts], shares, **EXACT)
    torch.testing.assert_close(routing.logits.softmax(dim=1), routing.probabilities, **EXACT)


def test_a_sequence_of_padding_alone_gives_zeros_and_finite_gradients():
    router, x = make_router("slots", slots_per_expert=2), samples(6).requires_grad_()
    mask = torch.tensor([True, False, True, False, False, False])
    slots = router(x, mask=mask, groups=2).slots
    assert not slots.dispatch[1].any() and not slots.combine[1].any()
    (slots.dispatch.square().sum() + slots.combine.square().sum()).backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def naive_soft_moe(layer: MoELayer, x: Tensor, real: list[bool]) -> Tensor:
    """Output [B, T, D_out], slot by slot and token by token."""
    batch, tokens, _ = x.shape
    dispatch, combine = naive_slots(layer.router, x.flatten(0, 1), batch, real)
    bank, p = layer.bank, layer.router.slots
    y = torch.zeros(batch, tokens, bank.w_out.shape[0], dtype=torch.double)
    for b in range(batch):
        for s in range(dispatch.shape[2]):
            mixed = sum(dispatch[b, t, s] * x[b, t] for t in range(tokens))
            units = bank.segment == s // p
            hidden = bank.act(bank.w_in[units] @ mixed + bank.b_in[units])
            output = bank.w_out[:, units] @ hidden + bank.b_out[s // p]
            for t in range(tokens):
                y[b, t] += combine[b, t, s] * output
    return y


def soft_layer(**options: int) -> MoELayer:
    config = registry.get("router", "slots").Config(**options)
    layer = MoELayer(6, 4, 12, num_experts=2, max_experts=6, router=config, activation="tanh")
    return layer.double()


@pytest.mark.parametrize("slots", [1, 2])
def test_the_layer_mixes_tokens_by_slots(slots):
    layer, x = soft_layer(slots_per_expert=slots), samples(10).view(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    y = layer(x, mask)
    expected = naive_soft_moe(layer, x, mask.flatten().tolist())
    torch.testing.assert_close(y, expected, **EXACT)
    assert not y[~mask].any()


def test_duplicated_experts_keep_soft_moe_as_it_was():
    """Copies of an expert get equal slots and share its combine weights."""
    layer, x = soft_layer(slots_per_expert=2).eval(), samples(10).view(2, 5, 6)
    before = layer(x)
    init = registry.get("init", "duplicate").Config()
    for experts in (3, 4):  # families of unequal size
        GrowthController(layer, init=init).grow(0, (x, None))
        assert layer.num_experts == experts
        torch.testing.assert_close(layer(x), before, **EXACT)
    torch.testing.assert_close(layer(x), before, **EXACT)


def test_slots_refuse_routing_by_sample():
    config = registry.get("router", "slots").Config()
    layer = MoELayer(6, 4, 12, num_experts=2, router=config, route_per="sample")
    with pytest.raises(UserError, match="needs route_per=token"):
        layer(torch.randn(2, 5, 6))


@pytest.mark.parametrize("name", ["expert-choice", "slots"])
def test_gradcheck(name):
    router, x = make_router(name), samples(6).requires_grad_()
    names, values = zip(*router.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(router, state, (x, None, None, 2))
        outputs = (routing.gates, routing.probabilities)
        return outputs if routing.slots is None else (*outputs, routing.slots.dispatch)

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("expert-choice", "capacity", 0.0), ("slots", "slots_per_expert", 0)],
)
def test_bad_options_are_refused(name, option, value):
    with pytest.raises(UserError, match=f"{name} router: {option}={value} must be") as error:
        make_router(name, **{option: value})
    assert "\n" not in str(error.value)

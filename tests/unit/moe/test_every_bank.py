"""Every registered bank in a layer, against a loop over independent experts in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from bank_cases import (
    BANKS,
    EXPERTS,
    ROUTERS,
    WIDTHS,
    WITH_UNITS,
    active_rows,
    alone,
    loop,
    samples,
)
from bank_cases import make_layer as make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe import registry
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer
from dynmoe.moe.router import hard_routing

each_bank = pytest.mark.parametrize("name", BANKS)
each_router = pytest.mark.parametrize("router", ROUTERS)


@each_bank
@each_router
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
def test_outputs_and_gradients_equal_the_loop(name, router, shared, gate_scale):
    layer = make(name, router, shared_hidden=shared, gate_scale=gate_scale)
    x = samples(name).requires_grad_()
    inputs = {"x": x, **dict(layer.named_parameters())}
    results = []
    for function in (layer, lambda x: loop(layer, x)):
        y = function(x)
        torch.manual_seed(5)
        results.append((y, torch.autograd.grad(y, list(inputs.values()), torch.randn_like(y))))
    (y, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for key, got, want in zip(inputs, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=key)
        assert want.abs().max() > 1e-3, key


@each_bank
@each_router
def test_gradcheck(name, router):
    layer = make(name, router, hidden=4)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = samples(name, 2).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@each_bank
@each_router
@settings(max_examples=10, deadline=None)
@given(data=st.data(), count=st.integers(1, 6))
def test_permuting_samples_permutes_the_output(name, router, data, count):
    torch.manual_seed(0)
    layer, x = make(name, router), samples(name, count)
    order = data.draw(st.permutations(range(count)))
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-12, atol=1e-12)


@each_bank
@each_router
def test_no_samples_give_no_output(name, router):
    layer = make(name, router)
    y = layer(samples(name, 2)[:0])
    assert len(y) == 0 and y.shape[1:] == layer(samples(name, 2)).shape[1:]


@each_bank
@each_router
def test_unborn_experts_have_no_influence_and_no_gradient(name, router):
    layer, x = make(name, router), samples(name, 30)
    before, rows = layer(x), active_rows(layer)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key in rows:
                parameter[EXPERTS:] = 1e30
    after = layer(x)
    assert torch.equal(before, after)
    after.square().sum().backward()
    for key, parameter in layer.named_parameters():
        if key in rows:
            assert not parameter.grad[EXPERTS:].any(), key
            assert parameter.grad[:EXPERTS].flatten(1).any(dim=1).all(), key


@each_bank
@pytest.mark.parametrize("sparse", [False, True])
def test_an_expert_with_gate_one_says_what_it_says_alone(name, sparse):
    layer, x = make(name), samples(name)
    outputs = layer.bank.expert_outputs(x)
    assert len(outputs) == layer.max_experts
    for expert in range(EXPERTS):
        owner = torch.full((len(x),), expert)
        routing = hard_routing(owner, owner >= 0, layer.router.active, x)
        if not sparse:
            routing.chosen = None
        expected = alone(name, layer.bank, expert, x)
        torch.testing.assert_close(outputs[expert], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bank(x, routing), expected, rtol=1e-12, atol=1e-12)


@each_bank
def test_samples_that_choose_nobody_get_zero(name):
    layer, x = make(name), samples(name)
    owner = torch.zeros(len(x), dtype=torch.long)
    for nobody in (owner > 0, torch.arange(len(x)) > 2):
        routing = hard_routing(owner, nobody, layer.router.active, x)
        y = layer.bank(x, routing)
        assert not y[~nobody].any() and y[nobody].flatten(1).any(dim=1).all()


@each_bank
@each_router
def test_the_gate_scale_multiplies_the_output(name, router):
    layer, x = make(name, router), samples(name)
    routing = layer.router(x if x.dim() == 2 else torch.randn(len(x), 5, dtype=torch.double))
    y, factors = layer.bank(x, routing), torch.rand(len(x), 1, dtype=torch.double)
    shaped = factors.view(-1, *[1] * (y.dim() - 1))
    torch.testing.assert_close(layer.bank(x, routing, factors), y * shaped)
    torch.testing.assert_close(layer.bank(x, routing, 3.0), 3.0 * y)


@each_bank
def test_padding_gets_zero_and_no_gradient(name):
    layer, x = make(name, "topk", shared_hidden=2), samples(name).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True])
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[mask], layer(x)[mask], rtol=1e-12, atol=1e-12)
    assert not y[~mask].any()
    y.sum().backward()
    assert not x.grad[~mask].any()


@each_bank
def test_the_shared_expert_is_counted_learns_and_has_no_router(name):
    plain, layer = make(name), make(name, shared_hidden=3)
    own = sum(p.numel() for p in layer.shared.parameters())
    assert own > 0
    assert sum(p.numel() for p in layer.parameters()) == own + sum(
        p.numel() for p in plain.parameters()
    )
    layer(samples(name)).square().sum().backward()
    assert all(p.grad.any() for p in layer.shared.parameters())
    if name in WITH_UNITS:
        assert layer.shared.hidden_sizes() == [3]


@each_bank
def test_the_generator_alone_decides_the_weights(name):
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.initial_seed() + 1)
        generator = torch.Generator().manual_seed(seed)
        config = registry.get("bank", name).Config()
        layer = MoELayer(*WIDTHS[name], 12, num_experts=3, bank=config, generator=generator)
        return layer.state_dict()

    first, again, other = state(1), state(1), state(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for key, value in first.items():
        if value.is_floating_point() and value.any() and not key.endswith("_extra_state"):
            assert not torch.equal(value, other[key]), key


@each_bank
def test_drawing_experts_or_units_leaves_the_others_alone(name):
    layer, generator = make(name), torch.Generator().manual_seed(3)
    drawn = torch.tensor([1, 4])
    before = copy.deepcopy(layer.bank)
    layer.bank.draw_experts(drawn, generator)
    rows = zip(before.expert_rows(), layer.bank.expert_rows(), strict=True)
    for old, new in rows:
        changed = (old != new).flatten(1).any(dim=1).nonzero().flatten()
        assert torch.equal(changed, drawn)
    if name not in WITH_UNITS:
        return
    before = copy.deepcopy(layer.bank)
    layer.bank.draw_units(drawn, generator)
    for key, axis in layer.bank.unit_axes():
        old, new = getattr(before, key), getattr(layer.bank, key)
        changed = (old != new).movedim(axis, 0).reshape(len(before.segment), -1).any(dim=1)
        assert torch.equal(changed.nonzero().flatten(), drawn), key


@each_bank
@each_router
def test_state_dict_restores_the_function(name, router):
    layer, other = make(name, router), make(name, router)
    GrowthController(layer, pruning=registry.get("pruning", "random").Config()).grow(1)
    x = samples(name)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x)) and other.num_experts == EXPERTS + 1


@each_bank
@each_router
def test_a_deep_copy_shares_nothing(name, router):
    layer, x = make(name, router), samples(name)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), y)


@each_bank
@each_router
def test_float32_stays_close_to_the_loop_in_float64(name, router):
    layer = make(name, router, shared_hidden=3)
    x = samples(name, 12).float()
    result = copy.deepcopy(layer).float()(x)
    assert result.dtype == torch.float32
    expected = loop(layer, x.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@each_bank
@each_router
def test_autocast_to_bfloat16_keeps_the_function(name, router):
    layer, x = make(name, router).float(), samples(name).float()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert (y.float() - expected).norm() < 0.1 * expected.norm()
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.bank.parameters())

"""Experts of different widths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from bank_cases import WITH_UNITS, WITHOUT_UNITS, loop, make_layer, samples
from hypothesis import given
from hypothesis import strategies as st

from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.settings import GrowthSettings
from dynmoe.moe.bank import even_sizes, spread_sizes


@given(st.integers(1, 30), st.integers(0, 300), st.floats(1, 1e6))
def test_sizes_add_up_fall_and_leave_none_without(experts, more, spread):
    sizes = spread_sizes(experts + more, experts, spread)
    assert len(sizes) == experts and sum(sizes) == experts + more
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 1


@given(st.integers(1, 30), st.integers(0, 300))
def test_a_spread_of_one_is_even(experts, more):
    assert spread_sizes(experts + more, experts, 1.0) == even_sizes(experts + more, experts)
    nearly = spread_sizes(experts + more, experts, 1 + 1e-12)
    assert nearly == even_sizes(experts + more, experts)


@pytest.mark.parametrize(
    ("units", "experts", "spread", "sizes"),
    [
        (15, 4, 8.0, [8, 4, 2, 1]),
        (30, 2, 2.0, [20, 10]),
        (7, 1, 5.0, [7]),
        (4, 4, 100.0, [1, 1, 1, 1]),
        (5, 4, 1e9, [2, 1, 1, 1]),
        (100, 3, 4.0, [57, 29, 14]),
    ],
)
def test_examples(units, experts, spread, sizes):
    assert spread_sizes(units, experts, spread) == sizes


def test_widths_are_geometric_where_units_abound():
    sizes = spread_sizes(10**6, 5, 16.0)
    ratios = [a / b for a, b in pairwise(sizes)]
    assert ratios == pytest.approx([2.0] * 4, rel=1e-4)


@pytest.mark.parametrize("spread", [0.5, 0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", WITH_UNITS)
def test_bad_spreads_are_refused(name, spread):
    with pytest.raises(UserError, match=f"spread={spread} must be a number of at least 1"):
        make_layer(name, bank={"spread": spread})


@pytest.mark.parametrize("router", ["cosine", "topk"])
@pytest.mark.parametrize("name", WITH_UNITS)
def test_a_constant_budget_keeps_the_spread_and_growth_works(name, router):
    layer = make_layer(name, router, bank={"spread": 4.0}, num_experts=2)
    assert layer.bank.hidden_sizes() == [10, 2]
    x = samples(name)
    controller = GrowthController(layer)
    for growth, sizes in enumerate([[7, 3, 2], [5, 4, 2, 1]], start=1):
        controller.grow(growth, (x, None))
        assert layer.bank.hidden_sizes() == sizes == spread_sizes(12, growth + 2, 4.0)
        torch.testing.assert_close(layer(x), loop(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WITHOUT_UNITS)
def test_banks_without_units_have_no_spread(name):
    assert not hasattr(registry.get("bank", name).Config(), "spread")


@pytest.mark.parametrize("budget", [Budget(), Budget(mode="per-growth")], ids=str)
def test_final_hidden_is_what_growth_leads_to(budget):
    bank = registry.get("bank", "swiglu").Config(spread=3.0)
    growth = GrowthSettings(granularity=2, bank=bank, budget=budget)
    layer = growth.make_layer(5, 4, 21, 2, 6, seeding.generator(0))
    assert layer.bank.hidden_sizes() == [16, 5]
    controller = growth.make_controller(layer, None, seeding.generator(0))
    for experts in (4, 6):
        controller.grow(0)
        assert growth.final_hidden(21, experts) == sum(layer.bank.hidden_sizes())
    assert growth.final_hidden(21, 6) == (21 if budget.mode == "constant" else 21 + 4 * 16)

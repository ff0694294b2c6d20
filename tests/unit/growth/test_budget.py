"""Hidden sizes after a growth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.errors import UserError
from dynmoe.growth import Budget
from dynmoe.growth.settings import GrowthSettings
from dynmoe.moe.bank import even_sizes


@given(st.integers(1, 300), st.integers(1, 40))
def test_even_sizes_differ_by_one_at_most(units, experts):
    sizes = even_sizes(units, experts)
    assert len(sizes) == experts and sum(sizes) == units
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_constant_budget_keeps_the_units_and_gives_each_expert_some(sizes, new):
    experts = len(sizes) + new
    if sum(sizes) < experts:
        with pytest.raises(UserError, match=f"the constant budget holds {sum(sizes)}"):
            Budget().sizes_after(sizes, new)
    else:
        after = Budget().sizes_after(sizes, new)
        assert after == even_sizes(sum(sizes), experts) and min(after) >= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 8), st.integers(0, 30))
def test_per_growth_budget_adds_units_for_each_new_expert(sizes, new, units):
    after = Budget(mode="per-growth", units=units).sizes_after(sizes, new)
    assert after == sizes + [units if units else sizes[0]] * new


def test_negative_units_are_refused():
    with pytest.raises(UserError, match="units=-1"):
        Budget(mode="per-growth", units=-1)


@pytest.mark.parametrize(("option", "value"), [("mode", "per_growth"), ("start", "half")])
def test_misspelt_words_are_refused(option: str, value: str):
    with pytest.raises(UserError, match=f"budget: {option}='{value}' is neither"):
        Budget(**{option: value})


def test_settings_refuse_a_plan_that_ends_without_units():
    growth = GrowthSettings(granularity=3)
    assert growth.most_experts(steps=100, tasks=5) == 15
    growth.check_budget(hidden=15, experts=15)
    with pytest.raises(UserError, match="grows to 15 experts"):
        growth.check_budget(hidden=14, experts=15)
    GrowthSettings(budget=Budget(mode="per-growth")).check_budget(hidden=14, experts=15)
    with pytest.raises(UserError, match="granularity 0"):
        GrowthSettings(granularity=0).most_experts(100, 5)

"""Interquartile mean, confidence intervals and comparisons against scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, t, trim_mean, ttest_1samp, ttest_rel

from dynmoe.lab.statistics import (
    Interval,
    confidence_interval,
    iqm,
    least_seen,
    paired_difference,
    probability_of_improvement,
    seeds_to_see,
)

numbers = st.floats(-1e3, 1e3)
rows = st.lists(numbers, min_size=1, max_size=15)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_iqm_is_scipys_trimmed_mean(values):
    assert iqm(values) == pytest.approx(trim_mean(values, 0.25), abs=1e-9)


def test_iqm_pools_tasks_and_ignores_tails():
    assert iqm([0, 1, 2, 100]) == 1.5
    assert iqm([[0, 1], [2, 100]]) == 1.5
    assert iqm([[0.0, 1], [100]]) == pytest.approx(101 / 3)  # floor(3/4) = 0 are cut
    assert iqm(np.arange(8.0)) == 3.5


def loop_interval(tasks: np.ndarray, statistic, resamples: int = 4000) -> tuple[float, float]:
    """t interval with the error of a stratified bootstrap, one resample at a time."""
    rng = np.random.default_rng(99)
    draws = [
        statistic(np.concatenate([rng.choice(row, len(row)) for row in tasks]))
        for _ in range(resamples)
    ]
    n, spread = tasks.shape[1], tasks.var(axis=1, ddof=1)
    freedom = (n - 1) * spread.sum() ** 2 / (spread**2).sum()
    reach = t.ppf(0.975, freedom) * np.std(draws) * math.sqrt(n / (n - 1))
    return statistic(tasks.ravel()) - reach, statistic(tasks.ravel()) + reach


@pytest.mark.parametrize("statistic", ["iqm", "mean"])
def test_interval_agrees_with_a_plain_loop(statistic):
    tasks = np.random.default_rng(1).normal([[0.0], [5.0], [9.0]], 1.0, (3, 10))
    plain = {"iqm": lambda v: trim_mean(v, 0.25), "mean": np.mean}[statistic]
    point, low, high = confidence_interval(tasks, statistic, resamples=4000)
    assert point == pytest.approx(plain(tasks.ravel()))
    expected = loop_interval(tasks, plain)
    assert (low, high) == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))
    # Strata: tasks 9 apart would make an unstratified interval several times as wide.
    pooled = confidence_interval(tasks.ravel(), "mean")
    assert high - low < 0.5 * (pooled.high - pooled.low)


def test_interval_is_reproducible_and_widens_with_confidence():
    values = np.random.default_rng(2).random(12)
    assert confidence_interval(values, seed=3) == confidence_interval(values, seed=3)
    assert confidence_interval(values, seed=3) != confidence_interval(values, seed=4)
    narrow = confidence_interval(values, confidence=0.5)
    wide = confidence_interval(values, confidence=0.99)
    assert wide.low < narrow.low < wide.point < narrow.high < wide.high


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12).filter(lambda v: len({*v}) > 1))
def test_the_interval_of_one_rows_mean_is_scipys(values):
    expected = ttest_1samp(values, 0).confidence_interval(0.9)
    _, low, high = confidence_interval(values, "mean", confidence=0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_few_seeds_cover_what_they_say(seeds, statistic):
    rng, hits = np.random.default_rng(5), 0
    for values in rng.normal(size=(600, seeds)):
        _, low, high = confidence_interval(values, statistic, resamples=200)
        hits += low <= 0 <= high
    assert 0.925 <= hits / 600 <= 0.985


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", ["normal", "exponential", "beta"])
def test_equal_methods_are_told_apart_in_five_of_a_hundred_comparisons(kind, seeds, statistic):
    """With methods that share their seeds' ups and downs, and in any distribution."""
    rng, wrong = np.random.default_rng(7), 0
    draw = {"normal": rng.normal, "exponential": rng.exponential, "beta": rng.beta}[kind]
    more = (8, 1) if kind == "beta" else (0, 1) if kind == "normal" else (1,)
    for _ in range(500):
        shared, a, b = draw(*more, size=(3, seeds))
        gap = paired_difference(shared + a, shared + b, statistic, resamples=200)
        wrong += gap.verdict("higher", "lower", "none") != "none"
    assert wrong / 500 <= 0.08


def test_tasks_of_few_seeds_cover_what_they_say():
    """Welch and Satterthwaite: tasks of other spreads and numbers of seeds."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(600):
        tasks = [rng.normal(0, 1, 3), rng.normal(2, 5, 5), rng.normal(-1, 0.2, 4)]
        _, low, high = confidence_interval(tasks, "mean")
        hits += low <= (5 * 2 - 4 * 1) / 12 <= high
    assert 0.92 <= hits / 600 <= 0.98


def test_two_seeds_have_a_wide_interval():
    point, low, high = confidence_interval([1.0, 3.0], "mean")
    assert point == 2 and (low, high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


def test_the_word_for_an_interval():
    words = ("above", "below", "between")
    assert Interval(2.0, 1.0, 3.0).verdict(*words) == "above"
    assert Interval(-2.0, -3.0, -1.0).verdict(*words) == "below"
    assert Interval(0.5, 0.0, 1.0).verdict(*words) == "between"
    assert confidence_interval([1.0]).verdict(*words) == "not known from one seed"


def test_ragged_tasks():
    point, low, high = confidence_interval([[1.0, 2, 3], [10.0, 11]], "mean")
    assert point == pytest.approx(27 / 5) and low < point < high


def test_one_seed_has_no_interval():
    for values in ([0.7], [[0.7], [0.8]], [[0.7, 0.8], [0.9]]):
        point, low, high = confidence_interval(values, "mean")
        assert math.isfinite(point) and math.isnan(low) and math.isnan(high)
    improvement = probability_of_improvement([0.9], [0.1, 0.2])
    assert improvement.point == 1 and math.isnan(improvement.low)


def test_constant_values_have_zero_width():
    assert confidence_interval([0.1] * 7, "mean") == pytest.approx((0.1, 0.1, 0.1))
    for count in range(2, 12):  # exactly, though sums of another order differ in the last bit
        tasks = np.random.default_rng(count).random(5)[:, None].repeat(count, axis=1)
        for statistic in ("mean", "iqm"):
            point, low, high = confidence_interval(tasks, statistic, resamples=50)
            assert low == high == point


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_named(bad):
    with pytest.raises(ValueError, match=r"\[task 0, seed 2\] is (nan|inf)"):
        iqm([1.0, 2.0, bad])
    with pytest.raises(ValueError, match=r"\[task 1, seed 0\]"):
        confidence_interval([[1.0, 2.0], [bad, 1.0]])
    with pytest.raises(ValueError, match=r"\[task 0, seed 1\]"):
        paired_difference([1.0, 2.0], [1.0, bad])
    with pytest.raises(ValueError, match=r"\[task 0, seed 0\]"):
        probability_of_improvement([bad, 2.0], [1.0, 2.0])


@pytest.mark.parametrize("empty", [[], [[]], [[1.0], []], 3.0, [[[1.0]]]])
def test_wrong_shapes_are_refused(empty):
    with pytest.raises(ValueError, match="row"):
        confidence_interval(empty)


def test_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="known: iqm, mean"):
        confidence_interval([1.0, 2.0], "median")  # type: ignore[arg-type]


def test_pairing_removes_what_seeds_share():
    rng = np.random.default_rng(0)
    seed_effect = rng.normal(0, 10, 8)
    a, b = seed_effect + 1 + rng.normal(0, 0.1, 8), seed_effect + rng.normal(0, 0.1, 8)
    point, low, high = paired_difference(a, b)
    assert point == pytest.approx(np.mean(a - b)) and 0.5 < low < point < high < 1.5
    sure = ttest_rel(a, b).confidence_interval()
    assert (low, high) == pytest.approx((sure.low, sure.high))
    assert paired_difference(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"\[8\] and \[7\]"):
        paired_difference(a, b[1:])


@settings(max_examples=40, deadline=None)
@given(rows, rows)
def test_improvement_is_mann_whitney(a, b):
    expected = mannwhitneyu(a, b).statistic / (len(a) * len(b))
    assert probability_of_improvement(a, b, resamples=20).point == pytest.approx(expected)


def test_improvement_over_tasks():
    a, b = [[2.0, 3.0, 4.0], [0.0, 0.0, 1.0]], [[0.0, 1.0, 1.0], [0.0, 1.0, 2.0]]
    point, low, high = probability_of_improvement(a, b)
    # Task 1: always better. Task 2: of 9 pairs 1 better, 3 ties.
    assert point == pytest.approx((1 + (1 + 3 / 2) / 9) / 2)
    assert 0.5 <= low < point < high <= 1
    assert probability_of_improvement(a, a).point == pytest.approx(0.5)
    assert probability_of_improvement([5.0, 6, 7], [1.0, 2, 3]) == (1, 1, 1)
    with pytest.raises(ValueError, match="2 tasks and b 1"):
        probability_of_improvement(a, [1.0, 2.0])


def test_the_least_difference_that_seeds_can_tell():
    """Simulated, four of five samples of a difference of that size show it."""
    assert least_seen([1.0], [0.0]) is None and least_seen([1.0, 1.0], [0.0, 0.0]) == 0
    assert least_seen([1.0, 2.0], [0.0, 0.0], 1 - 0.05 / 1000) > 1000  # far out, but known
    random = np.random.default_rng(0)
    for seeds, level in ((2, 0.05), (3, 0.05), (5, 0.05 / 9)):
        gaps = random.normal(size=seeds)
        least = least_seen(list(gaps), [0.0] * seeds, 1 - level) / gaps.std(ddof=1)
        draws = random.normal(least, 1.0, (20_000, seeds))
        assert 0.79 < (ttest_1samp(draws, 0, axis=1).pvalue < level).mean() < 0.81
    with pytest.raises(ValueError, match="2 and 1"):
        least_seen([1.0, 2.0], [1.0])


def test_seeds_to_see_a_difference():
    """Twice the spread takes four times the seeds; simulated, that many see it in four of five."""
    assert seeds_to_see([1.0, 3.0], [0.0, 0.0]) == 7  # d / s = sqrt 2: 6 have 79 % power
    assert seeds_to_see([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]) == 2
    assert seeds_to_see([0.1 + 0.2, 0.4], [0.3, 0.4]) is not None  # tiny, but sure
    assert seeds_to_see([1.0, -1.0 + 1e-9], [0.0, 0.0]) is None  # rounding
    assert seeds_to_see([1.0, -1.0], [0.0, 0.0]) is None and seeds_to_see([1.0], [0.0]) is None
    random = np.random.default_rng(0)
    pilot = random.normal(0.5, 1.0, 100_000)
    n = seeds_to_see(list(pilot), [0.0] * len(pilot))
    assert n is not None and 33 <= n <= 35
    draws = random.normal(0.5, 1.0, (4000, n))
    seen = ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert 0.78 < seen.mean() < 0.83
    with pytest.raises(ValueError, match="2 and 1"):
        seeds_to_see([1.0, 2.0], [1.0])

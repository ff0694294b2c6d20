"""Statistics over seeds and tasks: interquartile mean, confidence intervals, comparisons.

Data come as one row of seeds, [seeds], or as tasks of seeds: [tasks, seeds], or a list of rows of
unequal length; tasks (strata) are taken as independent of each other. Intervals of means and of
differences are Student's t intervals, which hold their level at 3 seeds. Percentile bootstraps, as
in Agarwal et al. 2021 (arXiv 2108.13264), do not: they cover 75 % there instead of 95 %.
Comparisons that are told together are a `Family`, whose intervals hold all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Statistic = Literal["iqm", "mean"]
Values = ArrayLike | Sequence[ArrayLike]

_BATCH = 500
"""resamples computed at once; bounds memory when there are many tasks"""


class Interval(NamedTuple):
    """A point estimate and the ends of its confidence interval; nan ends mean "not known"."""

    point: float
    low: float
    high: float

    def verdict(self, above: str, below: str, between: str) -> str:
        """The word for an interval above 0, below 0 or around it; of one seed nothing is known."""
        if math.isnan(self.low):
            return "not known from one seed"
        return above if self.low > 0 else below if self.high < 0 else between


def iqm(values: Values) -> float:
    """Interquartile mean: the mean after cutting floor(n/4) of the n values at each end.

    Tasks and seeds are pooled. Source: Agarwal et al. 2021 (arXiv 2108.13264), Section 4.3.

    Raises:
        ValueError: no value, or one that is not finite (its index is named).
    """
    return float(_iqm(np.concatenate(_strata(values)), axis=-1))


def confidence_interval(
    values: Values,
    statistic: Statistic = "iqm",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean or interquartile mean over all tasks and seeds, with its t interval.

    The standard error of the mean comes from the variances within the tasks; that of the
    interquartile mean is the bootstrap's, resampled within each task and corrected for the
    bootstrap's n in place of n - 1. The degrees of freedom are n - 1 for one task, and for several
    those of Welch and Satterthwaite. Sources: Welch 1947 (Biometrika 34); Hesterberg 2015 (arXiv
    1411.5279), Section 5, on the t interval with the bootstrap's error.

    Args:
        values: [seeds], [tasks, seeds], or rows of unequal length, one per task.
        statistic: "iqm" or "mean".
        confidence: within (0, 1).
        resamples, seed: of the bootstrap; the mean takes none.

    Returns:
        (point, low, high). With a single seed in some task its spread is unknown and both ends are
        nan; if every task's values are constant the interval has width 0. Of two seeds the ends lie
        12.7 standard errors away. `docs/studies.md` has a table of what the intervals cover: 95 %
        of normal data, less of skewed data. Ends are not held within the bounds of the values.

    Raises:
        ValueError: no value, one that is not finite (its index is named), an unknown statistic.
    """
    function, strata = _statistic(statistic), _strata(values)
    point = float(function(np.concatenate(strata), -1))
    if min(len(s) for s in strata) < 2:
        return Interval(point, float("nan"), float("nan"))
    if all((s == s[0]).all() for s in strata):
        return Interval(point, point, point)
    from scipy.stats import t

    sizes = np.array([len(s) for s in strata])
    parts = sizes * np.array([s.var(ddof=1) for s in strata])
    shares = parts / parts.sum()
    freedom = 1 / (shares**2 / (sizes - 1)).sum()
    if statistic == "mean":
        error = math.sqrt(parts.sum()) / sizes.sum()
    else:
        small = (shares * (sizes - 1) / sizes).sum()
        error = _bootstrap_error(strata, function, resamples, seed) / math.sqrt(small)
    reach = float(t.ppf((1 + confidence) / 2, freedom)) * error
    return Interval(point, point - reach, point + reach)


def paired_difference(
    a: Values,
    b: Values,
    statistic: Statistic = "mean",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean (or interquartile mean) of a - b, entry by entry, with its t interval.

    Pairing by seed removes what both runs share (data order, initial weights), so that fewer seeds
    show a difference. Arguments, ends and errors as in `confidence_interval`; of the mean over one
    task, 0 lies outside exactly where the paired t test rejects.

    Raises:
        ValueError: also when a and b differ in shape.
    """
    rows_a, rows_b = _strata(a), _strata(b)
    sizes_a, sizes_b = [len(r) for r in rows_a], [len(r) for r in rows_b]
    if sizes_a != sizes_b:
        raise ValueError(f"pairs need equal shapes; seeds per task are {sizes_a} and {sizes_b}")
    differences = [x - y for x, y in zip(rows_a, rows_b, strict=True)]
    return confidence_interval(differences, statistic, confidence, resamples, seed)


class Family:
    """Paired comparisons that one verdict makes, with intervals that hold all at once.

    Bonferroni: each of m intervals has level 1 - 0.05 / m, so that all hold together with at least
    95 %, also where the pair to be told is picked after a look at the results; and of equal methods
    a verdict calls any one better with a chance of at most 5 %. Source: Dunn 1961 (JASA 56).

    Args:
        size: comparisons in the family, m.

    Attributes:
        made: keys of the different comparisons made so far; one that is made again counts once.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.made: set[Hashable] = set()

    @property
    def confidence(self) -> float:
        """Level of each interval."""
        return 1 - 0.05 / self.size

    def difference(
        self, a: Sequence[float], b: Sequence[float], key: Hashable | None = None
    ) -> Interval:
        """Mean of a - b over seeds (`[S]` each), with its t interval at the family's level.

        Args:
            a, b: numbers of each seed.
            key: what is compared, so that two pairs with equal numbers count as two comparisons;
                None: the numbers.

        Raises:
            ValueError: as `paired_difference`.
        """
        self.made.add((tuple(a), tuple(b)) if key is None else key)
        return paired_difference(a, b, confidence=self.confidence)


def probability_of_improvement(
    a: Values,
    b: Values,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """P(a run of `a` beats a run of `b`), ties counting half, mean over tasks; with interval.

    The Mann-Whitney U statistic per task over the number of pairs; runs of a and b are resampled
    independently within each task and may differ in number. The ends are the bootstrap's
    percentiles, within 0 .. 1 but too narrow at few seeds: no verdict rests on them. They are nan
    with a single run in some task.

    Raises:
        ValueError: no value, one that is not finite, or another number of tasks in a than in b.

    Source: Agarwal et al. 2021 (arXiv 2108.13264), Section 4.3, "probability of improvement".
    """
    rows_a, rows_b = _strata(a), _strata(b)
    if len(rows_a) != len(rows_b):
        raise ValueError(f"a has {len(rows_a)} tasks and b {len(rows_b)}")
    tasks = len(rows_a)

    def improvement(*strata: Array, axis: int = -1) -> Array:
        pairs = zip(strata[:tasks], strata[tasks:], strict=True)
        return np.mean([_superiority(x, y, axis) for x, y in pairs], axis=0)

    return _bootstrap(rows_a + rows_b, improvement, confidence, resamples, seed)


def seeds_to_see(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> int | None:
    """Seeds at which `paired_difference` would most likely see the difference that these few show.

    The fewest at which the two-sided t test at level 1 - `confidence` has 80 % power against d / s,
    with d the mean and s the standard deviation of a - b. From few seeds d and s are rough, and so
    is n.

    Returns:
        n, at least 2; None where there are fewer than two seeds, or where n is above 10,000: the
        difference is then 0 but for rounding, or nothing that anyone would look for.

    Raises:
        ValueError: a and b differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need equal lengths; these are {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean = abs(float(difference.mean()))
    if len(difference) < 2 or mean == 0:
        return None
    spread = float(difference.std(ddof=1))
    if spread == 0:
        return 2
    from scipy.stats import norm

    reach = float(norm.ppf((1 + confidence) / 2) + norm.ppf(0.8))
    needed = max(2, math.ceil((reach * spread / mean) ** 2))  # of the normal test: fewer
    while needed <= 10_000 and _power(mean / spread, needed, confidence) < 0.8:
        needed += 1
    return needed if needed <= 10_000 else None


def least_seen(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> float | None:
    """The least difference that `paired_difference` would most likely see at these seeds.

    The mean of a - b at which the two-sided t test at level 1 - `confidence` has 80 % power, with
    the standard deviation that a - b shows here: a smaller difference cannot be told. From few
    seeds that deviation is rough, and so is this.

    Returns:
        In the unit of a and b; None where there are fewer than two seeds.

    Raises:
        ValueError: a and b differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need equal lengths; these are {len(a)} and {len(b)}")
    seeds = len(a)
    if seeds < 2:
        return None
    from scipy.optimize import brentq
    from scipy.stats import t

    highest = 10 + 3 * t.ppf((1 + confidence) / 2, seeds - 1)  # has more power at any seeds
    effect = brentq(lambda x: _power(x, seeds, confidence) - 0.8, 0, highest / math.sqrt(seeds))
    gaps = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(effect * gaps.std(ddof=1))


def _power(effect: float, seeds: int, confidence: float) -> float:
    """Chance that the two-sided t test sees a mean of `effect` standard deviations."""
    from scipy.stats import nct, t

    least = t.ppf((1 + confidence) / 2, seeds - 1)
    return float(nct.sf(least, seeds - 1, effect * math.sqrt(seeds)))


def _superiority(x: Array, y: Array, axis: int) -> Array:
    """Share of pairs with x > y plus half the share of ties, along `axis` of both."""
    gaps = np.moveaxis(x, axis, -1)[..., :, None] - np.moveaxis(y, axis, -1)[..., None, :]
    return (gaps > 0).mean(axis=(-2, -1)) + 0.5 * (gaps == 0).mean(axis=(-2, -1))


def _bootstrap(
    strata: list[Array],
    statistic: Callable[..., Array],
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Resample each stratum by itself; `statistic(*strata, axis=-1)` works along an axis."""
    point = float(statistic(*strata))
    if min(len(s) for s in strata) < 2:
        return Interval(point, float("nan"), float("nan"))
    if all((s == s[0]).all() for s in strata):  # resampling would differ in the last bit
        return Interval(point, point, point)
    from scipy.stats import bootstrap

    result = bootstrap(
        strata,
        statistic,
        n_resamples=resamples,
        batch=_BATCH,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(point, float(result.low), float(result.high))


def _bootstrap_error(
    strata: list[Array], function: Callable[[Array, int], Array], resamples: int, seed: int
) -> float:
    """Standard deviation of a statistic of the pooled values, each stratum resampled by itself."""
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, _BATCH):
        count = min(_BATCH, resamples - start)
        drawn = [s[rng.integers(len(s), size=(count, len(s)))] for s in strata]
        found.append(function(np.concatenate(drawn, axis=1), -1))
    return float(np.concatenate(found).std())


def _iqm(values: Array, axis: int) -> Array:
    """Interquartile mean along an axis, as `scipy.stats.trim_mean(values, 0.25)`."""
    ordered = np.moveaxis(np.sort(values, axis=axis), axis, -1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def _mean(values: Array, axis: int) -> Array:
    return values.mean(axis=axis)


def _statistic(name: str) -> Callable[[Array, int], Array]:
    known = {"iqm": _iqm, "mean": _mean}
    if name not in known:
        raise ValueError(f"unknown statistic {name!r}; known: {', '.join(known)}")
    return known[name]


def _strata(values: Values) -> list[Array]:
    """Values as one row of seeds per task.

    Raises:
        ValueError: an empty row, a row of another rank, or a value that is not finite.
    """
    rows = [values] if np.ndim(_first(values)) == 0 else list(values)  # type: ignore[arg-type]
    strata = [np.asarray(row, dtype=np.float64) for row in rows]
    for task, row in enumerate(strata):
        if row.ndim != 1 or row.size == 0:
            raise ValueError(f"task {task}: expected a row of seeds, got shape {row.shape}")
        bad = np.flatnonzero(~np.isfinite(row))
        if len(bad):
            raise ValueError(f"value at index [task {task}, seed {bad[0]}] is {row[bad[0]]}")
    return strata


def _first(values: Values) -> ArrayLike:
    """The first entry: a number for one row of seeds, a row for tasks of seeds."""
    try:
        return next(iter(values))  # type: ignore[arg-type]
    except (StopIteration, TypeError):
        raise ValueError("expected a non-empty row of seeds, or rows of them") from None


def three(interval: Interval) -> list[float | None]:
    """(point, low, high) for JSON; ends that are not known become null."""
    return [None if x != x else round(float(x), 4) for x in interval]

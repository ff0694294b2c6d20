"""How often the 95 % intervals of `dynmoe.lab.statistics` hold the true value at few seeds.

    python -m benchmarks.coverage [--trials 4000]

Draws that many samples of 3, 5 and 10 seeds from each distribution and counts. The true value is
the statistic's own mean over 400,000 samples of that size. The last column is of the paired
difference of two equal methods: how often a verdict calls one of them better, which should be 5 %.
Prints a table in Markdown; one core, 5 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dynmoe.lab.statistics import Statistic, confidence_interval, paired_difference

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.random(shape),
    "accuracies near 1: beta(8, 1)": lambda rng, shape: rng.beta(8, 1, shape),
    "skewed: exponential": lambda rng, shape: rng.exponential(size=shape),
}
SEEDS = (3, 5, 10)
STATISTICS: tuple[Statistic, ...] = ("mean", "iqm")
RESAMPLES = 500
"""of the IQM's standard error; fewer than by default, which changes little here"""


def coverage(draw: Draw, seeds: int, statistic: Statistic, trials: int) -> float:
    """Share of intervals that hold the true value."""
    rng = np.random.default_rng(seeds)
    cut = seeds // 4 if statistic == "iqm" else 0
    many = np.sort(draw(rng, (400_000, seeds)), axis=1)[:, cut : seeds - cut]
    true, hits = many.mean(), 0
    for values in draw(rng, (trials, seeds)):
        interval = confidence_interval(values, statistic, resamples=RESAMPLES)
        hits += interval.low <= true <= interval.high
    return hits / trials


def false_verdicts(draw: Draw, seeds: int, trials: int) -> float:
    """Share of paired comparisons of equal methods that call one of them better."""
    rng = np.random.default_rng(seeds)
    pairs = zip(draw(rng, (trials, seeds)), draw(rng, (trials, seeds)), strict=True)
    words = [paired_difference(a, b).verdict("yes", "yes", "no") for a, b in pairs]
    return words.count("yes") / trials


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=4000)
    trials = parser.parse_args().trials
    print(f"| seeds of | seeds | mean covered | IQM covered | false verdicts |\n|{'---|' * 5}")
    for name, draw in DISTRIBUTIONS.items():
        for seeds in SEEDS:
            covered = [coverage(draw, seeds, s, trials) for s in STATISTICS]
            shares = [*covered, false_verdicts(draw, seeds, trials)]
            print(f"| {name} | {seeds} | {' | '.join(f'{100 * x:.1f} %' for x in shares)} |")


if __name__ == "__main__":
    main()

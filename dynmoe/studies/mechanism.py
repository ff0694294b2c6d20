"""Which part of growth matters, where experts are kept? 24 forms of it, thinned as `keeping`."""

from __future__ import annotations

from itertools import product
from statistics import fmean
from typing import ClassVar

from dynmoe.lab.experiment import At, Results
from dynmoe.lab.statistics import Interval
from dynmoe.lab.study import Preset, Study
from dynmoe.studies.keeping import CUMULATIVE, NOISE, UNMEASURED, about, on_images, points

LEVELS: dict[str, tuple[str, ...]] = {
    "g": ("1", "2", "4"),
    "bank": ("pool", "bottleneck"),
    "rows": ("new", "all"),
    "budget": ("constant", "per-growth"),
}
"""Factor of `mechanism` -> its levels."""
CELLS = {" ".join(cell): dict(zip(LEVELS, cell, strict=True)) for cell in product(*LEVELS.values())}
"""Variant of `mechanism` -> factor -> its level."""
EFFECTS = {
    "g of 2 and 4 against 1": ("g", ("2", "4"), ("1",)),
    "bottleneck against pool": ("bank", ("bottleneck",), ("pool",)),
    "all router rows re-initialised against the new ones": ("rows", ("all",), ("new",)),
    "budget per growth against constant": ("budget", ("per-growth",), ("constant",)),
}
"""Main effect of `mechanism` -> factor, levels, and those that they are held against."""

MEASURES: tuple[tuple[str, At], ...] = (
    ("train_accuracy", "last"), ("online_accuracy", "mean"), ("test_accuracy", "last"),
)  # fmt: skip
"""What is judged. Train accuracy is full in most variants, which online accuracy tells apart."""


class Mechanism(Study, name="mechanism", source="Kim 2025 (arXiv 2511.18987)"):
    """Which part of growth matters, where experts are kept: g, the bank, router rows, the budget?

    The paper says g. All 24 combinations; a constant budget keeps units by utility, and budgets per
    growth end with the units of a dense block. A main effect is the mean of all variants at one
    level of a factor minus that at the other, seed by seed. Routers are today's default, cosine.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}

    def streams(self, preset: Preset) -> dict[str, str]:
        """Parts that add up, and parts whose labels are noisy at first."""
        short = f"--network.hidden 256 --epochs 15 --batch-size 32 {UNMEASURED}"
        return {
            "iid-cumulative": on_images(preset, 10, 100, short, CUMULATIVE),
            "noise": on_images(preset, 10, 200, short, NOISE),
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Every combination; dense and fresh networks beside them."""
        budget = {
            "constant": "--pruning utility",
            "per-growth": "--budget.mode per-growth --budget.start share",
        }
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            **{
                name: f"--granularity {c['g']} --bank {c['bank']} --init.router {c['rows']} "
                f"{budget[c['budget']]}"
                for name, c in CELLS.items()
            },
        }

    def verdict(self, results: Results) -> list[str]:
        """Each factor's main effect on what is learnt, how soon, and what generalises."""
        sentences = []
        for stream in results.streams:
            for metric, at in MEASURES:
                gaps = {e: self.effect(results, stream, e, metric, at) for e in EFFECTS}
                where = results.experiment.describe(metric, at)
                for effect, gap in gaps.items():
                    word = gap.verdict("higher", "lower", "no difference seen")
                    sentences.append(f"{stream}: {effect}: {points(gap)}, {word} ({where}).")
                most = max(gaps, key=lambda effect: abs(gaps[effect].point))
                seen = gaps[most].verdict("seen", "seen", "not seen")
                sentences.append(f"{stream}: largest in {where}: {most} ({seen}).")
        return [*sentences, about(results)]

    def effect(self, results: Results, stream: str, effect: str, metric: str, at: At) -> Interval:
        """A main effect, paired by seed."""
        factor, ones, others = EFFECTS[effect]

        def pooled(levels: tuple[str, ...]) -> list[float]:
            names = [name for name, cell in CELLS.items() if cell[factor] in levels]
            columns = [results.values(stream, name, metric, at) for name in names]
            return [fmean(seed) for seed in zip(*columns, strict=True)]

        return results.gap(pooled(ones), pooled(others))

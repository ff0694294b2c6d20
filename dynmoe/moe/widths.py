"""Widths of bottlenecked experts that spend a budget of parameters exactly.

An expert D_in -> h1 -> b -> h2 -> D_out has the weights and biases of its hidden units, and the
weights of its output: `h1 (D_in + 1 + b) + b + h2 (D_out + 1 + b)` parameters. Its output bias is
not counted: layers reserve one for each expert that may come, from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynmoe.moe.bank import even_sizes

Widths = tuple[int, int, int]
"""h1, b and h2 of an expert"""


@dataclass(frozen=True)
class Shape:
    """What experts have in common."""

    dim_in: int
    dim_out: int
    expansion: float
    """width of the expanded layers over that of the bottleneck, as nearly as the budget allows"""

    def cost(self, widths: Widths) -> int:
        """Parameters of an expert."""
        first, middle, last = widths
        return first * (self.dim_in + 1 + middle) + middle + last * (self.dim_out + 1 + middle)

    def total(self, experts: list[Widths]) -> int:
        """Parameters of several experts."""
        return sum(self.cost(widths) for widths in experts)


@dataclass(frozen=True)
class _Pattern:
    """Experts that share `middles` bottleneck units evenly, before their other widths are known."""

    shape: Shape
    middles: list[int]
    """bottleneck widths, falling by one at most"""
    budget: int

    @property
    def level(self) -> int:
        """The largest width of all expanded layers that the budget allows."""
        dims = self.shape.dim_in + self.shape.dim_out + 2
        return (self.budget - sum(self.middles)) // sum(dims + 2 * b for b in self.middles)

    @property
    def gap(self) -> float:
        """How far the ratio of widths is from the wanted one."""
        return abs(self.level * len(self.middles) / sum(self.middles) - self.shape.expansion)


def fit_widths(shape: Shape, budget: int, experts: int) -> list[Widths]:
    """Widths of `experts` experts, alike but for a few units, that cost the budget.

    Bottlenecks differ by one unit at most. Expanded layers differ by as few units as it takes for
    the sum to be the budget. Where none of the widths that are tried reach it, those of the largest
    sum below it: with two experts or more that happens only with a handful of units each.

    Returns:
        [E] widths; none where one unit in each layer of each expert would cost more.
    """
    patterns = _patterns(shape, budget, experts)
    if not patterns:
        return []
    best: tuple[int, list[Widths]] = (budget + 1, [])
    play = 0
    while play <= max(2, patterns[0].level // 4):
        for pattern in patterns:
            for found in _solutions(pattern, play):
                left = budget - shape.total(found)
                if left < best[0]:
                    best = (left, found)
                if left == 0:
                    return found
        play = 2 * play or 1
    return best[1]


def _patterns(shape: Shape, budget: int, experts: int) -> list[_Pattern]:
    """Ways to share bottleneck units out, those that keep to the expansion first."""
    found: list[_Pattern] = []
    middles = experts
    while True:
        pattern = _Pattern(shape, even_sizes(middles, experts), budget)
        if pattern.level < 1:
            break
        found.append(pattern)
        if pattern.level * experts < shape.expansion / 2 * middles:
            break  # from here on the bottleneck is too wide
        middles += 1
    found.sort(key=lambda p: p.gap)
    return found[: max(12, experts)]


def _solutions(pattern: _Pattern, play: int) -> Iterator[list[Widths]]:
    """Experts with `play` units less than the level in each layer, and 0 to 2 `play` + 1 more.

    Of all experts, those of the wider bottleneck pay one parameter more for a unit; how many of
    the units go to them tunes the sum by single parameters.
    """
    shape, middles = pattern.shape, pattern.middles
    experts, narrow = len(middles), min(middles)
    wide, most = middles.count(narrow + 1), 2 * play + 1
    base = pattern.level - play
    if base < 1:
        return
    left = pattern.budget - shape.total([(base, b, base) for b in middles])
    price_in, price_out = shape.dim_in + 1 + narrow, shape.dim_out + 1 + narrow
    middle = left / (price_in + price_out)
    for first in sorted(range(experts * most + 1), key=lambda n: abs(n - middle)):
        last = min((left - first * price_in) // price_out, experts * most)
        while last >= 0:
            extra = left - first * price_in - last * price_out
            bounds = [_bounds(n, wide, experts - wide, most) for n in (first, last)]
            if extra >= sum(low for low, _ in bounds):
                yield _deal(middles, base, (first, last), bounds, extra)
                break
            last -= 1


def _bounds(units: int, wide: int, narrow: int, most: int) -> tuple[int, int]:
    """Fewest and most of `units` that can go to the wide experts, `most` to each expert."""
    return max(0, units - narrow * most), min(units, wide * most)


def _deal(
    middles: list[int],
    base: int,
    units: tuple[int, int],
    bounds: list[tuple[int, int]],
    extra: int,
) -> list[Widths]:
    """Deal the units out, `extra` of them (or as many as can) to the wide experts."""
    wide = middles.count(min(middles) + 1)
    (low, high), (low_last, high_last) = bounds
    half = extra * units[0] // max(sum(units), 1)
    first = max(low, min(high, half), extra - high_last)
    first = min(first, high)
    last = max(low_last, min(high_last, extra - first))
    added = []
    for total, to_wide in zip(units, (first, last), strict=True):
        rest = len(middles) - wide
        some = even_sizes(to_wide, wide) if wide else []
        added.append(some + (even_sizes(total - to_wide, rest) if rest else []))
    return [(base + a, b, base + c) for a, b, c in zip(added[0], middles, added[1], strict=True)]

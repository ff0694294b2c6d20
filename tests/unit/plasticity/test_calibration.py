"""Calibration errors against loops over bins, written down from the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dynmoe.plasticity.calibration import (
    adaptive_calibration_error,
    calibration,
    calibration_error,
    confidences,
)


def binned(bins: list[list[tuple[float, float]]]) -> float:
    """`sum_b (n_b / N) |accuracy_b - confidence_b|` of bins of (confidence, right)."""
    total = sum(map(len, bins))
    gaps = [
        len(b) / total * abs(sum(r for _, r in b) / len(b) - sum(c for c, _ in b) / len(b))
        for b in bins
        if b
    ]
    return sum(gaps)


def test_equal_width_and_equal_mass_against_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    for count, bins in ((200, 15), (7, 15), (64, 4)):
        sure = torch.rand(count, generator=generator).double()
        right = torch.rand(count, generator=generator) < sure**2
        pairs = list(zip(sure.tolist(), right.double().tolist(), strict=True))
        wide = [[p for p in pairs if b / bins < p[0] <= (b + 1) / bins] for b in range(bins)]
        assert calibration_error(sure, right, bins) == pytest.approx(binned(wide), abs=1e-12)
        pairs.sort()
        used = min(bins, count)
        base, more = divmod(count, used)
        sizes = [base + (b < more) for b in range(used)]
        starts = [sum(sizes[:b]) for b in range(used)]
        mass = [pairs[start : start + n] for start, n in zip(starts, sizes, strict=True)]
        found = adaptive_calibration_error(sure, right, bins)
        assert found == pytest.approx(binned(mass), abs=1e-12)


def test_by_hand() -> None:
    """Two bins: 0.25 below, never right; 0.75 above, right twice in three."""
    sure = torch.tensor([0.25, 0.75, 0.75, 0.75])
    right = torch.tensor([False, True, False, True])
    assert calibration_error(sure, right, 2) == pytest.approx((0.25 + abs(2 - 2.25)) / 4)
    assert calibration_error(torch.ones(3), torch.ones(3).bool()) == 0
    assert calibration_error(torch.ones(3), torch.zeros(3).bool()) == 1
    # Halves of the mass: {0.25, 0.75} and {0.75, 0.75}; each 0.75 is right 2/3 of the time.
    halves = (abs(0 + 2 / 3 - 1.0) + abs(4 / 3 - 1.5)) / 4
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 0, 2]):
        assert adaptive_calibration_error(sure[order], right[order], 2) == pytest.approx(halves)


def test_confidences_of_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), float("-inf")], [2.0, 2.0, 2.0]])
    sure, right = confidences(logits, torch.tensor([1, 2]))
    assert sure.tolist() == pytest.approx([0.75, 1 / 3]) and right.tolist() == [True, False]
    assert list(calibration(sure, right)) == ["ece", "adaptive_ece"]


def test_nothing_and_nan_are_nan() -> None:
    for sure in (torch.zeros(0), torch.tensor([0.5, math.nan])):
        found = calibration(sure, torch.ones(len(sure)).bool())
        assert all(map(math.isnan, found.values()))

"""Self-normalised resets against a list of gaps per unit."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from intervention_helpers import Loop, batch
from test_intervention_redo import kill

from dynmoe.growth import Budget
from dynmoe.interventions.resetting import EXPANSION, SNR, FiringRecord, bin_edges


def test_bins_are_exact_where_short_and_narrow_where_long() -> None:
    edges = bin_edges(20_000).tolist()
    assert edges[:20] == list(range(1, 21)) and edges[-1] == 20_000
    assert all(b - a <= max(1, 0.05 * b) for a, b in pairwise(edges))
    assert bin_edges(1).tolist() == [1] and bin_edges(3).tolist() == [1, 2, 3]


def test_ages_gaps_thresholds_and_resets_are_the_algorithms() -> None:
    """With firings drawn at random; gaps stay below 20, where bins are exact."""
    quantile, period, limit, units = 0.8, 4, 15, 12
    loop = Loop("mlp", "snr", quantile=quantile, period=period, limit=limit)
    intervention = loop.intervention
    assert isinstance(intervention, SNR)
    reset: list[int] = []
    layer = intervention.layers[0]
    draw = layer.draw_incoming
    layer.draw_incoming = lambda index, g: (reset.extend(index.tolist()), draw(index, g))  # type: ignore[method-assign, assignment]
    rates = torch.linspace(0.02, 1.0, units)
    age, threshold = [0] * units, [limit] * units
    gaps: list[list[int]] = [[] for _ in range(units)]
    total = 0
    for step in range(1, 200):
        fired = torch.rand(units, generator=torch.Generator().manual_seed(step)) < rates
        intervention.seen = {0: fired}
        reset.clear()
        intervention.step_done()
        expected = []
        for i in range(units):
            age[i] += 1
            if fired[i]:
                gaps[i].append(age[i])
                age[i] = 0
            if step % period == 0:
                most = min(EXPANSION * threshold[i], limit)
                ranked = sorted(gaps[i])
                at = math.ceil(quantile * len(ranked)) - 1
                threshold[i] = min(ranked[max(at, 0)], most) if ranked else most
            if age[i] > threshold[i]:
                expected.append(i)
                gaps[i].append(age[i])
                age[i] = 0
        record = intervention.records[0]
        assert reset == expected, step
        assert record.age.tolist() == age and record.threshold.tolist() == threshold
        assert record.gaps.sum(dim=1).tolist() == [len(g) for g in gaps]
        total += len(expected)
    assert total > 20 and len(set(threshold)) > 3


def test_firing_is_any_positive_activation_in_the_batch() -> None:
    loop = Loop("mlp", "snr")
    kill(loop.model, 2)
    loop.model.train()
    hidden = loop.model[:3](batch(0)[0])  # type: ignore[index]
    loop.model(batch(0)[0])
    fired = loop.intervention.seen[0].tolist()  # type: ignore[attr-defined]
    assert fired == [any(v > 0 for v in column) for column in hidden.T.tolist()]
    assert not fired[2]


@pytest.mark.parametrize("network", ["mlp", "conv", "moe"])
def test_a_dead_unit_comes_back_to_life(network: str) -> None:
    loop = Loop(network, "snr", limit=3, period=2, lr=0.001)
    kill(loop.model, 1)
    layer = loop.intervention.layers[0]  # type: ignore[attr-defined]
    seen = []
    for step in range(1, 12):
        loop.run(step)
        out = layer.outgoing[0].unit_major(layer.outgoing[0].parameter)[1]
        seen.append(float((out != 0).float().mean()))  # units behind may be new in the same step
    assert seen[0] == 1 and min(seen) < 0.3 and seen[-1] > 0.5
    loop.model.train()(batch(0)[0])
    assert loop.intervention.seen[0][1]  # type: ignore[attr-defined]


def test_thresholds_at_most_double_and_shrink_at_once() -> None:
    loop = Loop("mlp", "snr", limit=20)
    intervention = loop.intervention
    assert isinstance(intervention, SNR)
    gaps = torch.zeros(4, 20, dtype=torch.long)
    gaps[0, 17], gaps[1, 1], gaps[2, 8] = 5, 5, 5
    record = FiringRecord(torch.zeros(4).long(), gaps, torch.tensor([4, 16, 4, 12]))
    intervention.estimate(record)
    assert record.threshold.tolist() == [8, 2, 8, 20]


def test_units_of_a_growth_start_again() -> None:
    for budget in (Budget(), Budget(mode="per-growth")):
        loop = Loop("moe", "snr", budget=budget, period=2).run(3)
        before = loop.intervention.records[1]  # type: ignore[attr-defined]
        gaps, bank = before.gaps.clone(), loop.model[3].bank  # type: ignore[index]
        old = bank.w_in.detach().clone()
        loop.controller.grow(3, batch(0))
        record = loop.intervention.records[1]  # type: ignore[attr-defined]
        new = torch.ones(len(bank.w_in), dtype=torch.bool)
        new[: len(old)] = (bank.w_in[: len(old)] != old).any(dim=1)
        assert gaps[new[: len(old)]].any() or len(old) < len(new)
        assert not record.gaps[new].any() and (record.threshold[new] == 20_000).all()
        assert torch.equal(record.gaps[~new], gaps[~new[: len(old)]])
        assert not record.age[new].any()
    loop.run(5)

"""Which units each pruning keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth.initialisation import FRESH, Request, cut_plan
from dynmoe.moe import ExpertBank, MoELayer

PRUNING = registry.names("pruning")
SIZES, TARGET = [5, 1, 6], [3, 2, 2, 4, 1]
OWNED = [range(5), range(5, 6), range(6, 12)]


def make_bank() -> ExpertBank:
    bank = MoELayer(3, 4, 12, num_experts=3, max_experts=5).bank
    bank.set_hidden_sizes(SIZES)
    return bank


def scores(name: str, bank: ExpertBank, activation: Tensor | None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return registry.get("pruning", name).Config().build().scores(bank, activation, generator)


def kept(values: Tensor) -> list[list[int]]:
    """Units that each of the five experts keeps or takes over; the rest must be fresh."""
    segment = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    plan = cut_plan(Request(segment, len(SIZES), TARGET, values, 1.0, torch.Generator()))
    assert plan.sizes == TARGET
    runs = [run.tolist() for run in plan.source.split(TARGET)]
    units = [[u for u in run if u != FRESH] for run in runs]
    # Kept units come first, then fresh ones: never one between two others.
    assert [u + [FRESH] * (len(r) - len(u)) for u, r in zip(units, runs, strict=True)] == runs
    return units


@pytest.mark.parametrize("name", PRUNING)
def test_experts_keep_only_units_of_their_own_in_order(name):
    units = kept(scores(name, make_bank(), torch.rand(12)))
    for mine, owned, target in zip(units, OWNED, TARGET, strict=False):
        assert set(mine) <= set(owned) and mine == sorted(set(mine))
        assert len(mine) in (0, min(target, len(owned)))
    assert units[3:] == [[], []]


def test_first_keeps_the_first_units():
    assert kept(scores("first", make_bank(), None)) == [[0, 1, 2], [5], [6, 7], [], []]


def test_reinit_keeps_none_of_experts_that_shrink():
    assert kept(scores("reinit", make_bank(), None)) == [[], [5], [], [], []]


def test_random_keeps_what_its_generator_says():
    bank = make_bank()
    draws = [kept(scores("random", bank, None, seed)) for seed in range(200)]
    assert draws[7] == kept(scores("random", bank, None, 7))
    often = torch.zeros(12)
    for draw in draws:
        often[[u for units in draw for u in units]] += 1
    assert (often[:5] - 120).abs().max() < 30 and often[5] == 200  # 3 of 5 units; 1 of 1
    assert (often[6:] - 67).abs().max() < 30  # 2 of 6


def test_utility_is_activation_times_outgoing_weight():
    bank, activation = make_bank(), torch.rand(12)
    expected = [
        float(activation[u]) * sum(abs(w) for w in bank.w_out[:, u].tolist()) for u in range(12)
    ]
    values = scores("utility", bank, activation)
    torch.testing.assert_close(values, torch.tensor(expected))
    assert not values.requires_grad
    best = [sorted(sorted(o, key=lambda u: -expected[u])[:t]) for o, t in zip(OWNED, TARGET)]  # noqa: B905
    assert kept(values)[:3] == best


def test_utility_needs_a_probe():
    with pytest.raises(UserError, match="needs a probe batch"):
        scores("utility", make_bank(), None)


def test_ties_go_to_the_first_unit():
    assert kept(torch.zeros(12)) == [[0, 1, 2], [5], [6, 7], [], []]

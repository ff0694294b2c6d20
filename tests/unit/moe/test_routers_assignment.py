"""Assignment routers against another solver, against all assignments there are, and in layers."""

from __future__ import annotations

import importlib.util
from itertools import combinations, product

import pytest
import torch
from router_cases import make_router, route, samples
from scipy.optimize import linear_sum_assignment

from dynmoe.errors import UserError
from dynmoe.moe import MoELayer


@pytest.mark.parametrize("n", [12, 10, 3, 1])
def test_base_is_the_balanced_assignment_of_largest_score(n):
    """Held against the Hungarian method on slots; spare slots go to rows without a preference."""
    router, x = make_router("base", 4), samples(n)
    routing = route(router, x)
    loads = routing.chosen.sum(dim=0).tolist()
    assert loads[4] == 0 and max(loads[:4]) - min(loads[:4]) <= 1 and sum(loads) == n
    scores = (x @ router.weight.T)[:, :4].detach()
    most, least = -(-n // 4), n // 4
    slots = scores.repeat_interleave(most, dim=1)
    spare = torch.full((4 * most - n, 4 * most), -1e6, dtype=torch.double)
    spare[:, [most * e + slot for e in range(4) for slot in range(least, most)]] = 0.0
    rows, columns = linear_sum_assignment(torch.cat([slots, spare]), maximize=True)
    best = sum(float(scores[r, c // most]) for r, c in zip(rows, columns, strict=True) if r < n)
    assert float(scores[routing.chosen[:, :4]].sum()) == pytest.approx(best, abs=1e-9)
    gate = torch.sigmoid(scores[routing.chosen[:, :4]])
    torch.testing.assert_close(routing.gates[routing.chosen], gate)


def test_base_is_greedy_in_evaluation_and_for_samples_that_must_not_compete():
    router, x = make_router("base", 3), samples(9)
    greedy = (x @ router.weight.T)[:, :3].argmax(dim=1).tolist()
    assert route(router, x).chosen.int().argmax(dim=1).tolist() != greedy
    router.independent = True
    assert route(router, x).chosen.int().argmax(dim=1).tolist() == greedy
    router.independent = False
    assert route(router.eval(), x).chosen.int().argmax(dim=1).tolist() == greedy


@pytest.mark.parametrize(("k", "capacity", "most"), [(2, 1.0, 4), (2, 1.3, 5), (1, 1.0, 2)])
def test_maxscore_is_the_best_of_all_assignments(k, capacity, most):
    """Five samples, three experts; an expert takes ceil(capacity k 5 / 3)."""
    router, x = make_router("maxscore", 3, k=k, capacity=capacity), samples(5)
    routing = route(router, x)
    scores = (x @ router.weight.T)[:, :3].log_softmax(dim=1).detach()
    best = max(
        sum(float(scores[n, list(own)].sum()) for n, own in enumerate(picks))
        for picks in product(list(combinations(range(3), k)), repeat=5)
        if all(sum(e in own for own in picks) <= most for e in range(3))
    )
    chosen = routing.chosen[:, :3]
    assert chosen.sum(dim=1).tolist() == [k] * 5 and int(chosen.sum(dim=0).max()) <= most
    assert float(scores[chosen].sum()) == pytest.approx(best, abs=1e-9)
    gates = torch.where(chosen, scores.exp(), 0.0)
    gates = gates / gates.sum(dim=1, keepdim=True) if k > 1 else gates
    torch.testing.assert_close(routing.gates[:, :3], gates)


@pytest.mark.parametrize("name", ["base", "maxscore"])
def test_padding_takes_no_place(name):
    router, x = make_router(name), samples(9)
    mask = torch.arange(9) % 3 != 0
    padded, alone = route(router, x, mask), route(router, x[mask])
    assert torch.equal(padded.chosen[mask], alone.chosen)
    assert not padded.chosen[~mask].any()


def test_a_new_expert_has_its_share_at_once():
    layer = MoELayer(6, 4, 24, num_experts=2, max_experts=3, router="base")
    layer(samples(12).float())
    assert layer.last_routing.chosen.sum(dim=0).tolist() == [6, 6, 0]
    layer.router.active[2] = True
    layer(samples(12).float())
    assert layer.last_routing.chosen.sum(dim=0).tolist() == [4, 4, 4]


def test_bad_options_and_a_missing_solver(monkeypatch):
    with pytest.raises(UserError, match="capacity=0.9 must be at least 1"):
        make_router("maxscore", capacity=0.9)
    with pytest.raises(UserError, match="k=9 must be between 1 and 5"):
        make_router("maxscore", k=9)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="router base needs scipy"):
        make_router("base")

"""Local routing consistency against all groups of experts, tried one by one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.moe import MoELayer
from dynmoe.moe.local_routing import (
    experts_chosen,
    experts_used,
    segment_cache_hit_rate,
    segment_routing_performance,
)


def groups(experts: int) -> list[tuple[int, ...]]:
    return [g for size in range(1, experts + 1) for g in combinations(range(experts), size)]


@pytest.mark.parametrize(("steps", "segment"), [(9, 4), (5, 5), (6, 1)])
def test_the_best_of_all_groups(steps, segment):
    trace = torch.rand(steps, 5).topk(2, dim=1).indices
    used = experts_chosen(trace, 5)
    assert used.sum(dim=1).tolist() == [2] * steps
    best, hits, uses = [], 0, 0
    for start in range(steps - segment + 1):
        needed = [set(row) for row in trace[start : start + segment].tolist()]
        scores = []
        for group in groups(5):
            found = sum(len(need & set(group)) for need in needed)
            precision, recall = found / (segment * len(group)), found / (segment * 2)
            scores.append(2 * precision * recall / (precision + recall) if found else 0.0)
        best.append(max(scores))
        hits += max(sum(len(need & set(g)) for need in needed) for g in combinations(range(5), 3))
        uses += 2 * segment
    assert segment_routing_performance(used, segment) == pytest.approx(sum(best) / len(best))
    assert segment_cache_hit_rate(used, segment, 3) == pytest.approx(hits / uses)


def test_the_ends_of_the_scale():
    steady = experts_chosen(torch.tensor([[0, 3]] * 8), 4)
    assert segment_routing_performance(steady, 4) == 1 == segment_cache_hit_rate(steady, 4, 2)
    assert segment_cache_hit_rate(steady, 4, 1) == 0.5
    turns = experts_chosen(torch.arange(8).unsqueeze(1) % 4, 4)
    assert segment_cache_hit_rate(turns, 4, 1) == 0.25 and segment_cache_hit_rate(turns, 4, 9) == 1
    # One of four experts: precision and recall 1/4; all four: precision 1/4, recall 1.
    assert segment_routing_performance(turns, 4) == pytest.approx(2 * 0.25 / 1.25)


def test_gates_of_layers_and_of_traces():
    """Sparse gates say what is used; of dense ones, and of experts to come, the k largest count."""
    layer = MoELayer(6, 4, 24, num_experts=3, max_experts=5, router="topk")
    layer(torch.randn(1, 7, 6))
    gates = layer.last_routing.gates.detach()
    assert torch.equal(experts_used(gates), layer.last_routing.chosen)
    layer.router.active[3] = True
    layer(torch.randn(1, 7, 6))
    assert segment_cache_hit_rate(experts_used(layer.last_routing.gates), 3, 4) == 1
    dense = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert experts_used(dense, 2).tolist() == [
        [True, False, True, False],
        [False] * 2 + [True, False],
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: experts_used(torch.ones(3)), "non-empty"),
        (lambda: experts_used(torch.ones(3, 2), 3), "k=3 must be between 1 and the 2 experts"),
        (lambda: experts_chosen(torch.tensor([[2]]), 2), "experts 0 to 1"),
        (lambda: segment_routing_performance(torch.ones(3, 2) > 0, 4), "segment=4"),
        (lambda: segment_cache_hit_rate(torch.ones(3, 2) > 0, 3, 0), "cache=0"),
        (lambda: segment_cache_hit_rate(torch.ones(3, 2) < 0, 3, 1), "no step uses any expert"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(UserError, match=message):
        call()

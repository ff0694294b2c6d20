"""The pictures that a run keeps of its experts."""

from __future__ import annotations

import torch
from torch import nn

from cl_benchmarks.measuring import expert_maps
from dynmoe.lab.heat_maps import heat_map
from dynmoe.moe import MoELayer
from dynmoe.moe.diagnostics import output_similarity, weight_similarity


def test_maps_show_classes_tasks_and_similarities() -> None:
    torch.manual_seed(0)
    layer = MoELayer(6, 6, 12, num_experts=3, max_experts=5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), layer).train()
    images, labels = torch.rand(10, 1, 2, 2), torch.arange(10) % 2
    past, now = torch.rand(8, 3).softmax(1), torch.rand(10, 3).softmax(1)
    before = torch.get_rng_state()
    maps = expert_maps(model, images, labels, {0: {"2": past}, 1: {"2": now}})
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and layer.last_routing is None

    names, numbers = ["expert 0", "expert 1", "expert 2"], ["0", "1", "2"]
    by_class = torch.stack([now[labels == c].double().mean(dim=0) for c in range(2)], dim=1)
    by_task = torch.zeros(3, 2, dtype=torch.double)
    by_task[:, 0], by_task[:, 1] = past.double().mean(dim=0), now.double().mean(dim=0)
    inputs = model[:2](images)
    similar = [
        heat_map(weight_similarity(layer), numbers, numbers, "alike: weights"),
        heat_map(output_similarity(layer, inputs, "cka"), numbers, numbers, "alike: outputs"),
    ]  # fmt: skip
    expected = {
        "experts/class/2": heat_map(by_class, names, ["0", "1"], "load by class"),
        "experts/task/2": heat_map(by_task, names, ["1", "2"], "load by task"),
        "experts/similarity/2": torch.cat(similar, dim=2),
    }
    assert maps.keys() == expected.keys()
    for tag in maps:
        assert torch.equal(maps[tag], expected[tag]), tag


def test_a_dense_network_has_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6))
    assert expert_maps(model, torch.rand(3, 1, 2, 2), torch.arange(3), {0: {}}) == {}

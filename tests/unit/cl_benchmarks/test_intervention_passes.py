"""Several passes in one step, layers that are called twice, and networks in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from intervention_helpers import batch, make, mlp, seeded
from torch import Tensor, nn

from dynmoe.interventions.units import find_units
from dynmoe.moe import MoELayer


def attached(name: str, model: nn.Module, **options: Any) -> Any:
    one = make(name, **options)
    one.transform(model, seeded(1))
    one.attach(model, torch.optim.SGD(model.parameters(), lr=0.0), seeded(2))
    return one


@pytest.mark.parametrize("name", ["cbp", "redo", "snr"])
def test_micro_batches_show_what_one_batch_shows(name: str) -> None:
    """As gradients accumulate: means over all of them, and who fired in any."""
    options = {"redo": {"period": 1}}.get(name, {})
    images = batch(0, size=24)[0]
    seen = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = mlp().train()
        one = attached(name, model, **options)
        for part in images.chunk(parts):
            model(part)
        seen.append(one.seen)
    assert seen[0].keys() == seen[1].keys() == {0, 1}
    for number in (0, 1):
        torch.testing.assert_close(seen[0][number], seen[1][number])


class Twice(nn.Module):
    """One MoE layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MoELayer(8, 8, hidden=8, num_experts=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x)))


def test_units_of_an_moe_layer_that_is_called_twice_count_once() -> None:
    model = Twice().train()
    assert [layer.name for layer in find_units(model)] == ["layer"]
    one = attached("cbp", model)
    for steps in range(1, 4):
        model(torch.randn(4, 8))
        one.step_done()
        assert one.records[0].age.unique().tolist() == [steps]


def test_nap_leaves_matrices_of_zeros_to_learn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(model[2].weight)
    one = make("nap", normalise=False)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    one.transform(model, seeded(1))
    one.attach(model, optimizer, seeded(2))
    first = model[0].weight.norm().item()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().sum(1).sub(1).square().mean().backward()
        optimizer.step()
        one.step_done()
    assert model[0].weight.norm().item() == pytest.approx(first, rel=1e-5)
    assert model[2].weight.norm() > 0


def test_the_tortoise_moves_in_bfloat16_too() -> None:
    """Steps of 1e-3 are below the rounding of the format."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Linear(4, 4).to(dtype)
        one = attached("hare-tortoise", model, momentum=0.999, period=400)
        start = model.weight.detach().float().clone()
        with torch.no_grad():
            model.weight.add_(1.0)
        for _ in range(399):
            one.step_done()
        moved[dtype] = (one.tortoise.first["weight"].float() - start).mean().item()
        one.step_done()
        assert model.weight.dtype == dtype
        assert (model.weight.float() - start).mean().item() == pytest.approx(0.33, abs=0.02)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.02)

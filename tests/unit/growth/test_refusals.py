"""Growths that would harm parameters in silence are refused; figures hold at the edge."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.new_experts import NewExperts
from dynmoe.growth.probe import classification_shock
from dynmoe.moe import MoELayer

PER_GROWTH = Budget(mode="per-growth")


def layer() -> MoELayer:
    return MoELayer(4, 4, hidden=8, num_experts=2, max_experts=4)


def test_two_optimizers_and_a_budget_per_growth() -> None:
    """Muon takes matrices alone, and the new biases would be in no optimizer."""
    model = nn.Sequential(layer(), nn.Linear(4, 2))
    matrices = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02)
    before = model[0].bank.b_in
    with pytest.raises(UserError, match=r"0\.bank\.b_in learns, is not in the controller's"):
        GrowthController(model, matrices, budget=PER_GROWTH).grow(0)
    assert model[0].bank.b_in is before and model[0].num_experts == 2
    GrowthController(model, matrices).grow(0)  # a constant budget replaces no Parameter
    assert model[0].bank.b_in is before and model[0].num_experts == 3
    before.requires_grad_(False)
    assert GrowthController(model, matrices, budget=PER_GROWTH).grow(1).experts == 4


def test_a_parameter_of_two_modules() -> None:
    model = nn.Sequential(layer(), layer())
    model[1].bank.w_in = model[0].bank.w_in
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"0\.bank\.w_in is a parameter of two modules"):
        GrowthController(model, optimizer, budget=PER_GROWTH).grow(0)
    shared = nn.Sequential(layer(), layer())
    shared[1].bank = shared[0].bank  # one module in two places
    assert GrowthController(shared)._check(dict(shared.named_children()), []) is None  # type: ignore[arg-type,func-returns-value]


def test_averages_of_buffers() -> None:
    model = nn.Sequential(layer())
    with pytest.raises(UserError, match="make it with use_buffers=False"):
        GrowthController(model, copies=[AveragedModel(model, use_buffers=True)]).grow(0)
    assert GrowthController(model, copies=[AveragedModel(model)]).grow(0).experts == 3


@pytest.mark.parametrize("granularity", [0, -1])
def test_no_experts(granularity: int) -> None:
    with pytest.raises(UserError, match=f"granularity={granularity} is too small; use 1 or more"):
        GrowthController(layer(), granularity=granularity)


def test_a_step_that_failed_is_not_paced_twice() -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    GrowthController(model, optimizer, new_experts=NewExperts(lr=0.5)).grow(0)
    new = model.bank.segment == 2

    def closure(fails: bool) -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if fails:
            raise RuntimeError("out of memory")
        return torch.zeros(())

    with pytest.raises(RuntimeError):
        optimizer.step(lambda: closure(True))
    before = model.bank.w_in.detach().clone()
    optimizer.step(lambda: closure(False))
    moved = before - model.bank.w_in.detach()
    assert torch.allclose(moved[new], torch.tensor(0.5), atol=1e-6)


def test_outputs_of_zeros_have_not_changed() -> None:
    zeros, ones = torch.zeros(3, 2), torch.ones(3, 2)
    assert classification_shock(zeros, zeros, None) == {"output_change": 0.0}
    assert classification_shock(ones, zeros, None) == {"output_change": 1.0}

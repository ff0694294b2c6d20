"""The pace of the experts of earlier growths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_new_experts import is_new, optimizer_of, step
from test_new_experts import network as make_network
from torch import nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.new_experts import NewExperts
from dynmoe.growth.old_experts import OldExperts, older_experts
from dynmoe.moe import moe_layers


def grown(old: OldExperts | None, kind: str, mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two steps of training, a growth from 2 to 4 experts, and one more step."""
    model = make_network()
    optimizer = optimizer_of(kind, model)
    controller = GrowthController(
        model, optimizer, granularity=2, budget=Budget(mode=mode), old_experts=old,
        pruning=registry.get("pruning", "first").Config(),
    )  # fmt: skip
    for number in range(2):
        step(model, optimizer, number)
    controller.grow(2)
    return model, optimizer


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("mode", ["constant", "per-growth"])
@pytest.mark.parametrize("pace", [0.0, 0.25])
def test_old_experts_take_shorter_steps(kind: str, mode: str, pace: float) -> None:
    torch.manual_seed(5)
    slow, slow_optimizer = grown(OldExperts(lr=pace), kind, mode)
    torch.manual_seed(5)
    usual, usual_optimizer = grown(None, kind, mode)
    before = {n: p.detach().clone() for n, p in usual.named_parameters()}
    step(slow, slow_optimizer, 2), step(usual, usual_optimizer, 2)
    [(name, layer)] = moe_layers(slow)
    assert older_experts(layer).tolist() == [0, 1]
    theirs = dict(usual.named_parameters())
    for key, parameter in slow.named_parameters():
        factor = torch.ones_like(parameter)
        if key.startswith(f"{name}."):
            own = key.removeprefix(f"{name}.")
            old = ~is_new(layer, own, parameter)
            if own.startswith("router.") or own == "bank.b_out":
                old[4:] = False  # experts that do not exist yet
            factor[old] = pace
        moved, full = parameter - before[key], theirs[key] - before[key]
        torch.testing.assert_close(moved, factor * full, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "rows", "pace"),
    [({"old_experts": OldExperts(lr=0.5)}, slice(0, 2), 0.5),
     ({"new_experts": NewExperts(lr=3.0)}, slice(2, 4), 3.0)],
    ids=["old", "new"],
)  # fmt: skip
def test_a_shared_routers_rows_have_their_pace_once(
    options: dict[str, Any], rows: slice, pace: float, layers: int
) -> None:
    model = make_network(layers, shared=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    GrowthController(model, optimizer, granularity=2, **options).grow(0)
    weight = model[0].router.weight
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close((before - weight)[rows], torch.full((2, 5), pace))


def test_before_any_growth_all_have_their_usual_pace() -> None:
    model = make_network()
    optimizer = optimizer_of("sgd", model)
    GrowthController(model, optimizer, old_experts=OldExperts(lr=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, 0)
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    [(_, layer)] = moe_layers(model)
    assert len(older_experts(layer)) == 0


@pytest.mark.parametrize("lr", [-0.1, 1.5, float("nan")])
def test_bad_paces_are_refused(lr: float) -> None:
    with pytest.raises(UserError, match=r"old_experts: lr=.* must be in 0 \.\. 1"):
        OldExperts(lr=lr)

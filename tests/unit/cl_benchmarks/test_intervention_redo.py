"""ReDo: dormant units, and what becomes of them."""

from __future__ import annotations

import pytest
import torch
from intervention_helpers import NETWORKS, Loop, batch
from torch import nn

from dynmoe.interventions.resetting import ReDo
from dynmoe.interventions.units import find_units


def kill(model: nn.Module, unit: int) -> None:
    """Let a unit of the first hidden layer never fire again."""
    layer = find_units(model)[0]
    with torch.no_grad():
        layer.incoming[0].parameter[unit] = 0.0
        if len(layer.incoming) > 1:
            layer.incoming[1].parameter[unit] = -10.0
        for norm in layer.norms:
            norm.weight[unit], norm.bias[unit] = 0.0, -10.0  # type: ignore[index, operator]


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_dormant_are_those_of_the_formula(tau: float) -> None:
    loop = Loop("mlp", "redo", tau=tau)
    intervention = loop.intervention
    assert isinstance(intervention, ReDo)
    activity = torch.tensor([0.0, 0.1, 0.2, 0.9, 3.0, 0.3, 0.0, 1.5, 0.25, 0.31, 0.5, 1.0])
    mean = sum(activity.tolist()) / 12
    expected = [i for i, a in enumerate(activity.tolist()) if a / (mean + 1e-9) <= tau]
    assert intervention.recycle(intervention.layers[0], activity).tolist() == expected
    assert len(expected) == (2 if tau == 0 else 4)


def test_activity_is_averaged_over_samples_and_positions() -> None:
    loop = Loop("conv", "redo", period=1)
    loop.model.train()(batch(0)[0])
    torch.manual_seed(0)
    model = NETWORKS["conv"]()
    maps = model[:3](batch(0)[0])  # type: ignore[index]
    expected = [float(maps[:, c].abs().mean()) for c in range(6)]
    assert loop.intervention.seen[0].tolist() == pytest.approx(expected, rel=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_dead_unit_comes_back_to_life_without_a_jolt(network: str) -> None:
    loop = Loop(network, "redo", tau=0.0, period=1)
    kill(loop.model, 1)
    intervention, images = loop.intervention, batch(5)[0]
    layer = intervention.layers[0]  # type: ignore[attr-defined]
    loop.model.train()(images)
    activity = intervention.seen[0]  # type: ignore[attr-defined]
    assert activity[1] == 0
    with torch.no_grad():
        before = loop.model.eval()(images)
        dead = intervention.recycle(layer, activity)  # type: ignore[attr-defined]
        after = loop.model(images)
    assert 1 in dead.tolist()
    if network != "moe":  # there the router looks on as well
        assert torch.allclose(before, after, atol=1e-6)
    assert all(not s.unit_major(s.parameter)[1].any() for s in layer.outgoing)
    loop.model.train()(images)
    assert intervention.seen[0][1] > 0  # type: ignore[attr-defined]
    loop.run(3)
    assert all(s.unit_major(s.parameter)[1].any() for s in layer.outgoing)


def test_acts_at_each_period_only() -> None:
    loop, calls = Loop("mlp", "redo", period=3), []
    recycle = loop.intervention.recycle  # type: ignore[attr-defined]
    loop.intervention.recycle = lambda *a: (calls.append(loop.intervention.steps), recycle(*a))  # type: ignore[attr-defined]
    loop.run(7)
    assert calls == [3, 3, 6, 6]


def test_only_the_latest_batch_counts_and_others_cost_nothing() -> None:
    loop, seen = Loop("mlp", "redo", period=3), []
    layer = loop.intervention.layers[0]  # type: ignore[attr-defined]
    activations = layer.activations
    layer.activations = lambda *a: (seen.append(loop.steps), activations(*a))[1]
    loop.run(7)
    assert seen == [2, 5]


def test_a_step_without_a_pass_does_no_harm_and_recycles_nothing() -> None:
    loop, calls = Loop("mlp", "redo", period=1), []
    loop.intervention.step_done()
    recycle = loop.intervention.recycle  # type: ignore[attr-defined]
    loop.intervention.recycle = lambda *a: (calls.append(1), recycle(*a))  # type: ignore[attr-defined]
    loop.run(1)
    assert len(calls) == 2
    loop.intervention.step_done()  # with what was seen before
    assert len(calls) == 2

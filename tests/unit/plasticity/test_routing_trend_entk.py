"""Routing drift, expert-task information, trends over tasks and the tangent kernel's rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from dynmoe.errors import NumericError
from dynmoe.moe import MoELayer, share_router
from dynmoe.plasticity.kernel import entk_effective_rank, entk_matrix
from dynmoe.plasticity.tasks import (
    expert_task_information,
    gate_shares,
    plasticity_summary,
    routing_drift,
)


def random_gates(seed: int, rows: int, experts: int, sharpness: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(rows, experts, generator=generator)).softmax(dim=1)


seeds, counts = st.integers(0, 10**6), st.integers(1, 7)
sharp = st.floats(0, 200)  # up to gates that underflow to exactly 0


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 20), counts, st.integers(0, 4), sharp)
def test_drift_is_a_finite_divergence(seed, rows, experts, born, sharpness):
    before = random_gates(seed, rows, experts, sharpness)
    after = random_gates(seed + 1, rows, experts + born, sharpness)
    drift = routing_drift(before, after)
    assert math.isfinite(drift) and drift >= 0
    assert routing_drift(before, before) == pytest.approx(0, abs=1e-9)
    p = np.pad(before.double().numpy(), ((0, 0), (0, born)))
    q = np.maximum(after.double().numpy(), 1e-12)
    p = p / p.sum(1, keepdims=True)
    terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)
    assert drift == pytest.approx(max(0, terms.sum(axis=1).mean()), rel=1e-5, abs=1e-6)


def test_drift_on_known_gates():
    before = torch.tensor([[0.5, 0.5]])
    assert routing_drift(before, torch.tensor([[0.25, 0.25, 0.5]])) == pytest.approx(math.log(2))
    assert routing_drift(torch.eye(2), torch.eye(2).flip(0)) == pytest.approx(math.log(1e12))
    floored = torch.tensor([[1.0, 1e-13]], dtype=torch.double)  # below the floor on both sides
    assert routing_drift(floored, floored) == 0
    half_moved = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert routing_drift(torch.eye(2), half_moved) == pytest.approx(math.log(1e12) / 2)


def test_drift_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="E' >= E"):
        routing_drift(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="got"):
        routing_drift(torch.ones(4, 3), torch.ones(5, 3))


def test_gate_shares_of_sparse_and_empty_rows():
    gates = torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    third = 1 / 3
    expected = torch.tensor([[1.0, 0, 0], [third] * 3, [0.5, 0.5, 0]], dtype=torch.double)
    torch.testing.assert_close(gate_shares(gates), expected)
    with pytest.raises(ValueError, match="negative"):
        gate_shares(-gates)
    with pytest.raises(ValueError, match="non-empty"):
        gate_shares(gates[0])


@settings(max_examples=60, deadline=None)
@given(seeds, counts, counts, sharp)
def test_information_bounds_and_definition(seed, tasks, experts, sharpness):
    gates = random_gates(seed, tasks, experts, sharpness)
    information, share = expert_task_information(gates)
    assert 0 <= information <= min(math.log(tasks), math.log(experts)) + 1e-9
    assert 0 <= share <= 1
    joint = gates.double().numpy() / gates.double().numpy().sum(1, keepdims=True) / tasks
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    used = joint > 0
    expected = (joint[used] * np.log(joint[used] / product[used])).sum()
    assert information == pytest.approx(expected, abs=1e-9)


def test_information_on_known_gates():
    assert expert_task_information(torch.eye(4)) == pytest.approx((math.log(4), 1.0))
    assert expert_task_information(torch.full((5, 3), 1 / 3)) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert expert_task_information(torch.ones(4, 1)) == (0.0, 0.0)
    assert expert_task_information(torch.tensor([[0.2, 0.8]])) == (0.0, 0.0)
    # Four tasks, two experts, each serving two tasks: all that two experts can tell.
    paired = torch.eye(2).repeat_interleave(2, dim=0)
    assert expert_task_information(paired) == pytest.approx((math.log(2), 1.0))
    # Two tasks, four experts, two of them for each task: all that two tasks can tell.
    assert expert_task_information(paired.T / 2) == pytest.approx((math.log(2), 1.0))


def test_summary_of_known_curves():
    falling = plasticity_summary([0.9, 0.7, 0.5, 0.3])
    expected = {"slope": -0.2, "last_over_first": 1 / 3, "mean": 0.6, "min": 0.3}
    assert falling == pytest.approx(expected)
    assert plasticity_summary([0.4])["slope"] == 0
    assert math.isnan(plasticity_summary([0.0, 0.5])["last_over_first"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12))
def test_summary_slope_is_least_squares(values):
    summary = plasticity_summary(values)
    assert summary["slope"] == pytest.approx(np.polyfit(range(len(values)), values, 1)[0], abs=1e-9)
    assert summary["min"] <= summary["mean"] + 1e-12


def test_summary_refuses_bad_input():
    with pytest.raises(ValueError, match="task 1 is nan"):
        plasticity_summary([0.5, float("nan")])
    with pytest.raises(ValueError, match="one accuracy per task"):
        plasticity_summary([])


def reference_entk_rank(model: nn.Module, inputs: torch.Tensor) -> float:
    """The definition with torch.func's Jacobian of all samples' summed logits at once."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def summed(values):
        return functional_call(model, values, (inputs,)).sum(dim=1)

    jacobian = jacrev(summed)(parameters)
    j = torch.cat([v.flatten(1) for v in jacobian.values()], dim=1).double().numpy()
    values = np.clip(np.linalg.eigvalsh(j @ j.T), 0, None)
    p = values / values.sum()
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


def test_entk_equals_the_jacobian_definition(case):
    model, x, _ = case
    model.eval()
    expected = reference_entk_rank(model, x[:12])
    model.train()
    assert entk_effective_rank(model, x[:12]) == pytest.approx(expected, rel=1e-4)
    assert 1 <= expected <= 12
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_entk_of_linear_models():
    """For logits W x, K = C x x^T: orthonormal inputs have full rank, equal ones rank 1."""
    model = nn.Linear(8, 3, bias=False)
    assert entk_effective_rank(model, torch.eye(8)) == pytest.approx(8)
    torch.testing.assert_close(entk_matrix(model, torch.eye(8)), 3 * torch.eye(8).double())
    assert entk_effective_rank(model, torch.ones(5, 8)) == pytest.approx(1)
    assert entk_effective_rank(model, torch.zeros(5, 8)) == 0
    low = torch.randn(40, 3) @ torch.randn(3, 8)  # 37 eigenvalues are rounding, of either sign
    p = torch.linalg.svdvals(low.double())[:3].square()
    expected = math.exp(torch.distributions.Categorical(p / p.sum()).entropy())
    assert entk_effective_rank(model, low) == pytest.approx(expected, rel=1e-4)
    assert entk_matrix(model, torch.randn(70, 8)).shape == (64, 64)


def shared_router():
    torch.manual_seed(0)
    layers = [MoELayer(4, 4, 8, num_experts=2, max_experts=4) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    share_router(model)
    return model


def tied_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", [shared_router, tied_layers])
def test_entk_where_layers_share_weights(make):
    model, x = make(), torch.randn(6, 4)
    parameters = dict(model.named_parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(model(row).sum(), model.parameters())])
        for row in x.split(1)
    ]
    jacobian = torch.stack(rows).double()
    torch.testing.assert_close(entk_matrix(model, x), jacobian @ jacobian.T, rtol=1e-4, atol=1e-5)
    assert all(parameters[name] is own for name, own in model.named_parameters())
    model.double()  # a tensor of a trace that is over would refuse


def test_entk_refuses_bad_input():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="at least one input"):
        entk_effective_rank(model, torch.zeros(0, 4))
    with pytest.raises(NumericError):
        entk_effective_rank(model, torch.full((2, 4), float("nan")))
    with pytest.raises(ValueError, match="trainable"):
        entk_effective_rank(model.requires_grad_(False), torch.zeros(2, 4))

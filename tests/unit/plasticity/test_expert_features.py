"""The rank of router-weighted expert features against numpy, and on features known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe.growth import GrowthController
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.metrics import weighted_rank
from dynmoe.plasticity.probes import ExpertProbe, Probe, take_probe

TAG = "expert_features/effective_rank"


def expert(gates: Tensor, hidden: Tensor, segment: list[int]) -> ExpertProbe:
    """Experts with these gates [N, E] and hidden units [N, H]."""
    none = torch.zeros(0)
    owner, created = torch.tensor(segment), torch.zeros(gates.shape[1])
    return ExpertProbe(gates, hidden, owner, created, none, none, none, none)


def probe_of(experts: dict[str, ExpertProbe]) -> Probe:
    zeros = torch.zeros(4, 2)
    return Probe({}, zeros, zeros, 0.0, {}, {}, None, experts)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.integers(1, 4))
def test_rank_matches_the_eigenvalues_of_the_gram(seed, samples, units, experts):
    generator = np.random.default_rng(seed)
    hidden = generator.standard_normal((samples, units)) * 10 ** generator.uniform(-2, 0, units)
    gates = generator.random((samples, experts))
    segment = generator.integers(0, experts, units)
    features = np.array(
        [[gates[n, segment[h]] * hidden[n, h] for h in range(units)] for n in range(samples)]
    )
    p = np.linalg.eigvalsh(features.T @ features / samples)
    p = p[p > 1e-14 * p.max()] / p.sum()
    found = weighted_rank(expert(torch.tensor(gates), torch.tensor(hidden), segment.tolist()))
    assert found == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert 1 - 1e-9 <= found <= min(samples, units) + 1e-9


def test_known_ranks():
    eye = torch.eye(6)
    assert weighted_rank(expert(torch.ones(6, 1), eye, [0] * 6)) == pytest.approx(6)
    half = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    assert weighted_rank(expert(half, eye, [0, 0, 0, 1, 1, 1])) == pytest.approx(3)
    assert weighted_rank(expert(0 * half, eye, [0, 0, 0, 1, 1, 1])) == 0.0
    uneven = torch.diag(torch.tensor([2.0, 1.0, 1.0]))  # eigenvalues 4 : 1 : 1
    expected = math.exp(-(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6)))
    assert weighted_rank(expert(torch.ones(3, 1), uneven, [0] * 3)) == pytest.approx(expected)


def test_several_layers_are_averaged_and_listed():
    one = expert(torch.ones(6, 1), torch.ones(6, 3), [0] * 3)
    three = expert(torch.ones(6, 1), torch.eye(6, 3), [0] * 3)
    assert measure_all(probe_of({"a": three}), ["expert-features"]) == {TAG: pytest.approx(3)}
    values = measure_all(probe_of({"a": one, "b": three}), ["expert-features"])
    expected = {TAG: 2, f"{TAG}/a": 1, f"{TAG}/b": 3}
    assert values == {tag: pytest.approx(value) for tag, value in expected.items()}
    assert measure_all(probe_of({}), ["expert-features"]) == {}


def test_a_network_through_a_growth(moe_case):
    model, x, y = moe_case
    controller, values = GrowthController(model, torch.optim.Adam(model.parameters())), []
    for step in range(2):
        values.append(measure_all(take_probe(model, x, y), ["expert-features"])[TAG])
        layer, entered = model[2], model[:2](x)
        gates = layer.router(entered).gates[:, layer.bank.segment]
        sigma = np.linalg.svd((layer.bank.hidden(entered) * gates).detach().double())[1]
        p = sigma[sigma > 0] ** 2 / (sigma**2).sum()
        assert values[-1] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
        controller.grow(step, probe=(x, y))
    assert values[0] != values[1]

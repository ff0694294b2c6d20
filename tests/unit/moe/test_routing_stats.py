"""Figures of routing count real samples only; labels by expert as in the survey's Eq. 16."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynmoe.plasticity.metrics  # noqa: F401
from dynmoe import registry
from dynmoe.moe import MoELayer, routing_inputs, routing_stats
from dynmoe.moe.diagnostics import expert_use, label_uncertainty, routing_table, row_labels
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.probes import take_probe
from dynmoe.plasticity.tasks import expert_task_information, information_by_expert
from dynmoe.tta.measures import use_of_experts

ALONE = [n for n in registry.names("router") if n not in ("expert-choice", "slots", "oracle")]


def make_layer(name: str, **options) -> MoELayer:
    config = registry.get("router", name).Config(**options)
    return MoELayer(8, 8, hidden=16, num_experts=4, max_experts=6, router=config).double()


@pytest.mark.parametrize("name", ALONE)
def test_figures_of_a_padded_batch_are_those_of_its_real_rows(name):
    layer, x = make_layer(name).eval(), torch.randn(64, 8).double()
    labels, mask = torch.arange(64) % 3, torch.rand(64) < 0.3
    layer(x, mask=mask)
    padded, diagnosed = routing_stats(layer, labels)[""], use_of_experts(layer)
    table = routing_table(layer.last_routing.gates[:, :4], labels, mask=mask)
    layer(x[mask])
    assert padded == pytest.approx(routing_stats(layer, labels[mask])[""], abs=1e-9)
    assert diagnosed == pytest.approx(use_of_experts(layer), abs=1e-9)
    torch.testing.assert_close(table, routing_table(layer.last_routing.gates[:, :4], labels[mask]))


def test_padding_alone_says_nothing():
    layer = make_layer("topk")
    layer(torch.randn(5, 8).double(), mask=torch.zeros(5, dtype=torch.bool))
    assert routing_stats(layer) == {} == use_of_experts(layer)
    gates, none = torch.rand(5, 4), torch.zeros(5, dtype=torch.bool)
    assert expert_use(gates, torch.zeros(4), none) == {}
    assert expert_use(gates, torch.zeros(4), ~none) == expert_use(gates, torch.zeros(4))


@pytest.mark.parametrize("route_per", ["token", "sample"])
def test_probes_hold_real_rows_only(route_per):
    torch.manual_seed(0)
    layer = MoELayer(8, 12, 16, num_experts=3, route_per=route_per).double()
    model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(48, 3).double())
    x, labels, mask = torch.randn(9, 4, 8).double(), torch.arange(9) % 3, torch.arange(9) < 6
    given = mask if route_per == "sample" else mask.unsqueeze(1).expand(9, 4)
    with routing_inputs(model, mask=given):
        padded = take_probe(model, x, labels).experts["0"]
    alone = take_probe(model, x[mask], labels[mask])
    real = alone.experts["0"]
    assert padded.gates.shape == real.gates.shape == (24, 3) and padded.hidden.shape == (24, 16)
    torch.testing.assert_close(padded.gates, real.gates)
    torch.testing.assert_close(padded.hidden, real.hidden)
    measured = measure_all(alone, ["router", "dormant", "expert-features"])
    assert all(math.isfinite(value) for value in measured.values())
    with routing_inputs(model, mask=torch.zeros_like(given)):
        assert take_probe(model, x, labels).experts == {}


def naive_entropy(labels: list[int]) -> float:
    """H of a list of labels, in nats; nan for none."""
    counts = Counter(labels).values()
    return -sum(c / len(labels) * math.log(c / len(labels)) for c in counts) if labels else math.nan


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_information_of_each_expert_is_eq_16(seed, n, experts, kinds):
    """`I(label; e) = H(label) - H(label | S_e)`, S_e the samples with a gate above 0."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(n, experts, generator=generator, dtype=torch.double)
    gates = gates * (torch.rand(n, experts, generator=generator) < 0.5)
    labels = torch.randint(kinds, (n,), generator=generator) * 7 - 3
    whole, own = label_uncertainty(gates, labels)
    assert whole == pytest.approx(naive_entropy(labels.tolist()))
    for e in range(experts):
        taken = [label for g, label in zip(gates[:, e], labels.tolist(), strict=True) if g > 0]
        assert own[e] == pytest.approx(naive_entropy(taken), nan_ok=True)
    shares = gates / gates.sum(dim=1, keepdim=True)
    shares = torch.where(shares.isnan(), 1 / experts, shares)
    _, own = label_uncertainty(gates, labels, weighted=True)
    for e in range(experts):
        mass = [float(shares[labels == label, e].sum()) for label in labels.unique()]
        total = sum(mass)
        expected = -sum(m / total * math.log(m / total) for m in mass if m) if total else math.nan
        assert own[e] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_known_information():
    """Expert 0 takes label 0 alone, expert 1 one of each, expert 2 nothing."""
    gates = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    whole, own = label_uncertainty(gates, torch.tensor([0, 0, 0, 1]))
    assert whole == pytest.approx(naive_entropy([0, 0, 0, 1]))
    assert own == pytest.approx([0.0, math.log(2), math.nan], nan_ok=True)
    layer = make_layer("oracle")
    layer(torch.randn(6, 8).double(), context=torch.tensor([0, 0, 1, 1, 3, 3]))
    values = routing_stats(layer, torch.tensor([0, 0, 1, 2, 1, 2]))[""]
    assert values["label_entropy"] == pytest.approx(math.log(3))
    found = {n: v for n, v in values.items() if n.startswith("label_information/")}
    expected = {0: math.log(3), 1: math.log(1.5), 3: math.log(1.5)}
    assert found == pytest.approx({f"label_information/expert_{e}": v for e, v in expected.items()})


def test_tokens_take_their_samples_label():
    layer = make_layer("topk")
    layer(torch.randn(6, 4, 8).double())
    values = routing_stats(layer, torch.arange(6) % 2)[""]
    assert values["label_entropy"] == pytest.approx(math.log(2))
    assert row_labels(torch.tensor([5, 6]), 4).tolist() == [5, 5, 6, 6]
    for labels in (torch.arange(5), torch.arange(0)):
        with pytest.raises(ValueError, match="cannot belong to 24 routed rows"):
            row_labels(labels, 24)


def test_experts_information_on_tasks_averages_to_that_of_all():
    gates = torch.rand(5, 3, dtype=torch.double)
    loads = (gates / gates.sum(dim=1, keepdim=True)).mean(dim=0)
    own = information_by_expert(gates)
    total = sum(float(loads[e]) * value for e, value in own.items())
    assert total == pytest.approx(expert_task_information(gates)[0])
    assert information_by_expert(torch.eye(4)) == pytest.approx(
        dict.fromkeys(range(4), math.log(4))
    )
    assert set(information_by_expert(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))) == {0}

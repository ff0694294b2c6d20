"""Norms and router use against numpy restatements, and on inputs with known answers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynmoe.moe.diagnostics import expert_use
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.metrics import expert_norms
from dynmoe.plasticity.probes import ExpertProbe, Probe, copy_parameters, take_probe


def bare_probe(activations: dict[str, Tensor], **changes: Any) -> Probe:
    """A probe with hand-made activations (and whatever else is given)."""
    features = torch.zeros(4, 2)
    probe = Probe(activations, features, torch.zeros(4, 2), 0.0, {}, {}, None, {})
    return dataclasses.replace(probe, **changes)


def bare_expert(
    gates: Tensor, hidden: Tensor, segment: list[int], created: list[int] | None = None
) -> ExpertProbe:
    h, created = hidden.shape[1], created or [0] * gates.shape[1]
    w_in, w_out = torch.ones(h, 3), torch.ones(2, h)
    owners, ages = torch.tensor(segment), torch.tensor(created)
    return ExpertProbe(gates, hidden, owners, ages, w_in, w_out, 2 * w_in, 2 * w_out)


# norms --------------------------------------------------------------------------------------------


def test_norms_against_numpy(moe_case):
    model, x, y = moe_case
    born = copy_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    probe = take_probe(model, x, y, initial=born)
    values = measure_all(probe, ["norms"])

    def flat(tensors: dict[str, Tensor], prefix: str = "") -> np.ndarray:
        kept = [t for n, t in tensors.items() if n.startswith(prefix)]
        return np.concatenate([t.numpy().ravel() for t in kept]).astype(np.float64)

    w, g = flat(probe.parameters), flat(probe.gradients)
    assert probe.initial is not None
    moved = np.linalg.norm(w - flat(probe.initial))
    assert values["weight_norm/l2"] == pytest.approx(np.linalg.norm(w))
    assert values["weight_norm/mean_abs"] == pytest.approx(np.abs(w).mean())
    assert values["weight_norm/distance_to_init"] == pytest.approx(moved)
    assert values["grad_norm/l2"] == pytest.approx(np.linalg.norm(g))
    assert values["grad_norm/zero_share"] == (g == 0).mean()
    layers = [np.linalg.norm(flat(probe.gradients, p)) for p in ("0.", "2.router", "2.bank", "3.")]
    assert values["grad_norm/l2/2.bank"] == pytest.approx(layers[2])
    assert values["weight_norm/l2/0"] == pytest.approx(np.linalg.norm(flat(probe.parameters, "0.")))
    found = [values[f"grad_norm/layer_{k}"] for k in ("min", "mean", "max")]
    assert found == pytest.approx([min(layers), np.mean(layers), max(layers)])


def test_gradient_norms_by_expert_and_age(moe_case):
    model, x, y = moe_case
    probe = take_probe(model, x, y)
    values = measure_all(probe, ["norms"])
    g_in, g_out = probe.gradients["2.bank.w_in"], probe.gradients["2.bank.w_out"]
    w_in, w_out = probe.parameters["2.bank.w_in"], probe.parameters["2.bank.w_out"]
    runs = [slice(0, 7), slice(7, 14), slice(14, 20)]
    grads = [math.hypot(g_in[r].norm().item(), g_out[:, r].norm().item()) for r in runs]
    weights = [math.hypot(w_in[r].norm().item(), w_out[:, r].norm().item()) for r in runs]
    for e in range(3):
        assert values[f"grad_norm/l2/2/expert_{e}"] == pytest.approx(grads[e], rel=1e-5)
        assert values[f"weight_norm/l2/2/expert_{e}"] == pytest.approx(weights[e], rel=1e-5)
    assert values["grad_norm/expert_age_0"] == pytest.approx(grads[2], rel=1e-5)  # born at 1
    assert values["grad_norm/expert_age_1"] == pytest.approx((grads[0] + grads[1]) / 2, rel=1e-5)


def test_dead_units_show_as_zero_gradient():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight[:2] = -1.0  # never fire on positive inputs
        model[0].weight[2:] = 1.0
    values = measure_all(take_probe(model, torch.rand(8, 3) + 0.1, torch.zeros(8).long()))
    assert values["grad_norm/zero_share"] == (2 * 3 + 2 * 2) / 20
    assert values["dormant/0"] == values["inactive_share"] == 0.5


def test_distance_to_init_skips_parameters_without_a_known_start():
    parameters = {"a": torch.ones(4), "new": torch.full((3,), 9.0)}
    probe = bare_probe(
        {}, parameters=parameters, initial={"a": torch.zeros(4), "gone": torch.ones(2)}
    )
    assert measure_all(probe, ["norms"])["weight_norm/distance_to_init"] == 2.0


def test_frozen_bank_has_no_gradient_tags(moe_case):
    model, x, y = moe_case
    model[2].requires_grad_(False)
    values = measure_all(take_probe(model, x, y), ["norms"])
    assert "weight_norm/l2/2/expert_0" in values
    assert not any(tag.startswith(("grad_norm/l2/2", "grad_norm/expert_age")) for tag in values)


def test_expert_without_units_has_norm_zero():
    found = expert_norms(torch.ones(4, 3), torch.ones(2, 4), torch.tensor([0, 0, 2, 2]), 3)
    assert found == pytest.approx([math.sqrt(10), 0.0, math.sqrt(10)])


# router -------------------------------------------------------------------------------------------


def use(gates: Tensor, created: list[int] | None = None) -> dict[str, float]:
    return expert_use(gates, torch.tensor(created or [0] * gates.shape[1]))


def test_router_on_known_gates():
    uniform = use(torch.full((6, 4), 0.25))
    assert uniform["entropy"] == pytest.approx(1) and uniform["balance"] == pytest.approx(1)
    one_hot_even = use(torch.eye(4).repeat(3, 1), created=[0, 0, 1, 1])
    assert one_hot_even["entropy"] == 0 and one_hot_even["balance"] == pytest.approx(1)
    assert one_hot_even["newest_share"] == pytest.approx(0.5)
    collapsed = use(torch.eye(4)[[2] * 6], created=[0, 1, 2, 3])
    assert collapsed["entropy"] == collapsed["balance"] == collapsed["newest_share"] == 0
    assert (collapsed["load_max"], collapsed["load_min"]) == (1, 0)
    assert (collapsed["used_experts"], collapsed["dead_experts"]) == (1, 3)


def test_a_single_expert_is_sharp_and_balanced():
    values = use(torch.ones(5, 1))
    assert (values["entropy"], values["balance"], values["newest_share"]) == (0, 1, 1)


def test_thresholds_of_used_and_dead():
    """With E = 4 an expert is used above .025 and dead below .01."""
    values = use(torch.tensor([[0.943, 0.03, 0.02, 0.007]]))
    assert (values["used_experts"], values["dead_experts"]) == (2, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(2, 8), st.floats(0, 30))
def test_router_matches_numpy(seed, samples, experts, sharpness):
    generator = np.random.default_rng(seed)
    z = sharpness * generator.standard_normal((samples, experts))
    g = np.exp(z - z.max(axis=1, keepdims=True))
    g /= g.sum(axis=1, keepdims=True)
    values = use(torch.tensor(g), created=list(range(experts)))

    def h(p: np.ndarray) -> float:
        return -sum(v * math.log(v) for v in p if v > 0) / math.log(experts)

    assert values["entropy"] == pytest.approx(np.mean([h(row) for row in g]), abs=1e-9)
    assert values["balance"] == pytest.approx(h(g.mean(axis=0)), abs=1e-9)
    assert values["load_max"] == pytest.approx(g.mean(axis=0).max())
    assert values["newest_share"] == pytest.approx(g.mean(axis=0)[-1], abs=1e-12)
    assert values["entropy"] <= values["balance"] + 1e-9  # entropy is concave


def test_several_layers_are_averaged_and_listed():
    hidden = torch.ones(4, 2)
    experts = {
        "a": bare_expert(torch.full((4, 2), 0.5), hidden, [0, 1]),
        "b": bare_expert(torch.eye(4)[[1] * 4], hidden, [0, 1]),
    }
    values = measure_all(bare_probe({}, experts=experts), ["router"])
    assert values["router/entropy/a"] == pytest.approx(1) and values["router/entropy/b"] == 0
    assert values["router/entropy"] == pytest.approx(0.5)
    assert values["router/load_max"] == pytest.approx(0.75)
    alone = measure_all(bare_probe({}, experts={"a": experts["a"]}), ["router"])
    assert not any(tag.endswith("/a") for tag in alone)

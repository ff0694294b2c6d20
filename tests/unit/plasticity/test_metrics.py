"""Each metric against an independent restatement in numpy, and on inputs with known answers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import NumericError, UserError
from dynmoe.plasticity import metrics
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.probes import ExpertProbe, Probe, copy_parameters, take_probe

ranks = {
    "srank99": metrics.srank99,
    "stable_rank_fro": metrics.stable_rank_fro,
    "effective_rank": metrics.effective_rank,
    "feature_rank": lambda s: metrics.feature_rank(s, 40),
}

OF_EXPERTS = ("router", "expert-features")
"""metrics that have nothing to say about a network without experts"""


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


def test_every_metric_gives_finite_floats(case):
    model, x, y = case
    probe = take_probe(model, x, y, initial=copy_parameters(model))
    for name in registry.names("metric"):
        values = registry.get("metric", name).Config().build().measure(probe)
        for tag, value in values.items():
            assert type(value) is float and math.isfinite(value), tag
        assert values or (name in OF_EXPERTS and not probe.experts), name


def test_measure_all_joins_the_metrics(moe_case):
    model, x, y = moe_case
    probe = take_probe(model, x, y)
    values = measure_all(probe)
    parts = [measure_all(probe, [name]) for name in registry.names("metric")]
    assert values == {tag: v for part in parts for tag, v in part.items()}
    assert len(values) == sum(len(part) for part in parts)  # no tag is used twice
    assert {"dormant/0.025", "rank/srank99", "router/entropy", "weight_norm/l2"} <= values.keys()
    with pytest.raises(UserError, match="Did you mean 'dormant'"):
        measure_all(probe, ["dorment"])
    broken = dataclasses.replace(probe, gradients={"w": torch.tensor([float("inf")])})
    with pytest.raises(NumericError, match="grad_norm/l2"):
        measure_all(broken)


# dormant ------------------------------------------------------------------------------------------


def numpy_dormant(layers: list[np.ndarray], tau: float) -> float:
    """ReDo's ratio, units in the last axis."""
    low = total = 0
    for h in layers:
        mean = np.abs(h.reshape(-1, h.shape[-1]).astype(np.float64)).mean(axis=0)
        low += int((mean / (mean.mean() + 1e-9) <= tau).sum())
        total += len(mean)
    return low / total


def test_dormant_on_known_units():
    """Mean |h| of 0, 1, 1, 2 over a mean of 1: scores 0, 1, 1, 2."""
    h = torch.tensor([[0.0, 1, -1, 4], [0, 1, 1, 0]])
    values = measure_all(bare_probe({"a": h}), ["dormant"])
    assert values["dormant/0"] == values["dormant/0.025"] == values["dormant/0.1/a"] == 0.25
    config = metrics.Dormant.Config(taus=(0.99, 1.0))
    values = config.build().measure(bare_probe({"a": h, "b": torch.zeros(2, 4)}))
    assert values["dormant/0.99/a"] == 0.25 and values["dormant/1/a"] == 0.75
    assert values["dormant/1/b"] == 1.0  # a dead layer has score 0, not 0/0
    assert values["dormant/1"] == 7 / 8


def test_conv_units_are_channels_and_token_units_the_last_axis():
    conv, tokens = torch.randn(5, 3, 4, 4), torch.randn(5, 7, 3)
    conv[:, 1] = 0
    tokens[..., :2] = 0
    values = measure_all(bare_probe({"c": conv, "t": tokens}), ["dormant"])
    assert values["dormant/0/c"] == values["inactive_share/c"] == 1 / 3
    assert values["dormant/0/t"] == values["inactive_share/t"] == 2 / 3
    assert values["dormant/0"] == 0.5
    torch.testing.assert_close(
        metrics.mean_activity(conv), conv.double().abs().mean(dim=0).mean(dim=(1, 2))
    )


def test_inactive_is_not_dormant():
    """A unit that fires rarely but strongly is inactive, one that fires weakly is dormant."""
    h = torch.ones(200, 3)
    h[:, 0] = 0
    h[0, 0] = 1e4  # on 0.5 % of inputs
    h[:, 1] = 1e-6
    values = measure_all(bare_probe({"a": h}), ["dormant"])
    assert values["inactive_share"] == 1 / 3 and values["dormant/0"] == 0.0
    assert values["dormant/0.025"] == 1 / 3
    h[:2, 0] = 1.0  # 1 % is not less than 1 %
    assert measure_all(bare_probe({"a": h}), ["dormant"])["inactive_share"] == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.floats(0, 2))
def test_dormant_matches_numpy_and_stays_in_range(seed, samples, units, tau):
    generator = np.random.default_rng(seed)
    layers = [generator.standard_normal((samples, units)) for _ in range(2)]
    layers[0] *= generator.random(units) < 0.6
    probe = bare_probe({str(i): torch.tensor(h) for i, h in enumerate(layers)})
    values = metrics.Dormant.Config(taus=(tau,)).build().measure(probe)
    assert values[f"dormant/{tau:g}"] == numpy_dormant(layers, tau)
    assert all(0 <= v <= 1 for v in values.values())


def test_routed_units_are_judged_on_their_own_samples():
    """Unit 1 of expert 0 fires only where expert 0 is not in charge: dead when routed."""
    gates = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]])
    hidden = torch.tensor([[1.0, 0, 9], [1, 0, 9], [1, 5, 2], [1, 5, 2]])
    expert = bare_expert(gates, hidden, [0, 0, 1])
    values = measure_all(bare_probe({"m.hidden": hidden}, experts={"m": expert}), ["dormant"])
    assert values["dormant/0"] == 0.0
    assert values["dormant_routed/0"] == values["dormant_routed/0/m"] == 1 / 3
    expected = torch.tensor([1.0, 0.0, 2.0], dtype=torch.double)
    torch.testing.assert_close(metrics.routed_activity(expert), expected)


@pytest.mark.parametrize("experts", [1, 3, 7])
def test_uniform_routing_judges_on_all_samples(experts):
    hidden = torch.randn(20, 14)
    gates = (1e-6 * torch.rand(20, experts)).softmax(dim=1)  # uniform up to rounding
    expert = bare_expert(gates, hidden, sorted(i % experts for i in range(14)))
    torch.testing.assert_close(metrics.routed_activity(expert), metrics.mean_activity(hidden))


# rank ---------------------------------------------------------------------------------------------


def numpy_ranks(h: np.ndarray) -> dict[str, float]:
    """The four definitions, from the Gram matrix where that is possible."""
    s = np.linalg.svd(h.astype(np.float64), compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    k = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.99 * s.sum() * (1 - 1e-12))
    gram = h.astype(np.float64).T @ h.astype(np.float64)
    return {
        "srank99": k,
        "stable_rank_fro": np.trace(gram) / np.linalg.eigvalsh(gram).max(),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "feature_rank": (s > 0.01 * math.sqrt(len(h))).sum(),
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 16), st.floats(-3, 2))
def test_ranks_match_numpy_and_stay_in_range(seed, samples, width, log_scale):
    generator = np.random.default_rng(seed)
    spectrum = 10 ** generator.uniform(-3, 0, width)
    h = generator.standard_normal((samples, width)) * spectrum * 10**log_scale
    values = measure_all(bare_probe({}, features=torch.tensor(h)), ["rank"])
    for name, expected in numpy_ranks(h).items():
        assert values[f"rank/{name}"] == pytest.approx(expected, rel=1e-6), name
    for name in ("srank99", "stable_rank_fro", "effective_rank"):
        assert 1 - 1e-9 <= values[f"rank/{name}"] <= min(samples, width) + 1e-9, name


@pytest.mark.parametrize(
    ("h", "expected"),
    [
        (torch.zeros(40, 5), (0, 0, 0, 0)),
        (torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 6)), (1, 1, 1, 1)),
        (torch.eye(40), (40, 40, 40, 40)),
        (torch.eye(100), (99, 100, 100, 100)),  # 99 of 100 equal values hold exactly 99 %
        (torch.diag(torch.tensor([2.0, 1, 1])), (3, 1.5, 2**1.5, 3)),
        (1e-3 * torch.eye(40), (40, 40, 40, 0)),  # feature_rank alone depends on scale
        (1e-30 * torch.eye(40), (40, 40, 40, 0)),
    ],
)
def test_ranks_of_known_matrices(h, expected):
    sigma = metrics.singular_values(h)
    for (name, function), value in zip(ranks.items(), expected, strict=True):
        assert function(sigma) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.7, 1.1])
def test_srank_settles_ties_whatever_the_rounding(scale):
    assert metrics.srank99(torch.full((100,), scale, dtype=torch.double)) == 99


def test_ranks_take_half_precision_features():
    h = torch.randn(20, 6)
    exact = metrics.effective_rank(metrics.singular_values(h.bfloat16().float()))
    assert metrics.effective_rank(metrics.singular_values(h.bfloat16())) == pytest.approx(exact)


def test_expert_ranks_use_the_experts_own_units():
    hidden = torch.zeros(30, 5)
    hidden[:, :2] = torch.eye(30, 2)
    hidden[:, 2:] = torch.arange(30.0)[:, None]
    expert = bare_expert(torch.full((30, 3), 1 / 3), hidden, [0, 0, 1, 1, 1])
    values = measure_all(bare_probe({}, experts={"m": expert}), ["rank"])
    tags = [f"rank/effective_rank/m/expert_{e}" for e in range(3)]
    assert [values[t] for t in tags] == pytest.approx([2, 1, 0])  # the third owns no unit
    assert values["rank/feature_rank/m.hidden"] == 3
    assert values["rank/srank99"] == 0  # all-zero features

"""L2, L2-Init, Parseval and spectral penalties against a few plain lines each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from intervention_helpers import NETWORKS, Loop, batch, make, seeded, weights
from torch import Tensor, nn

from dynmoe.growth import Budget
from dynmoe.interventions.intervention import Intervention
from dynmoe.moe import MoELayer


def attached(network: str, name: str, **options: Any) -> tuple[nn.Module, Intervention]:
    """A network in float64 and an intervention at work on it."""
    torch.manual_seed(0)
    model = NETWORKS[network]().double()
    intervention = make(name, **options)
    intervention.attach(model, torch.optim.SGD(model.parameters(), 0.1), seeded())
    return model, intervention


def shaken(model: nn.Module) -> None:
    """Move every weight."""
    g = seeded(4)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g, dtype=p.dtype)


def loops(tensor: Tensor) -> float:
    return math.fsum(value * value for value in tensor.flatten().tolist())


@pytest.mark.parametrize("network", NETWORKS)
def test_l2(network: str) -> None:
    model, intervention = attached(network, "l2", strength=0.3)
    shaken(model)
    total = 0.0
    for name, p in model.named_parameters():
        own = "router" in name or name.endswith("3.bank.b_out")
        total += loops(p[:2] if own and network == "moe" else p)  # 2 of 8 experts are active
    assert float(intervention.penalty()) == pytest.approx(0.3 * total, rel=1e-12)


def test_l2_pulls_on_living_experts_alone() -> None:
    model, intervention = attached("moe", "l2")
    intervention.penalty().backward()  # type: ignore[union-attr]
    layer = model[3]  # type: ignore[index]
    assert isinstance(layer, MoELayer)
    for rows in (layer.router.weight.grad, layer.bank.b_out.grad):
        assert rows[:2].abs().min() > 0 and not rows[2:].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_l2_init(network: str) -> None:
    model, intervention = attached(network, "l2-init", strength=0.3)
    first = weights(model)
    assert float(intervention.penalty()) == 0
    shaken(model)
    total = math.fsum(loops(p.detach() - first[n]) for n, p in model.named_parameters())
    assert float(intervention.penalty()) == pytest.approx(0.3 * total, rel=1e-12)


def test_l2_init_stays_nearer_to_the_start_and_l2_nearer_to_zero() -> None:
    def far(name: str, **options: Any) -> tuple[float, float]:
        loop = Loop("mlp", name, **options)
        first = weights(loop.model)
        loop.run(60)
        now = weights(loop.model)
        start = sum(loops(now[n] - first[n]) for n in now)
        return start, sum(loops(value) for value in now.values())

    plain = far("none")
    assert far("l2-init", strength=0.1)[0] < 0.5 * plain[0]
    assert far("l2", strength=0.1)[1] < 0.5 * plain[1]


@pytest.mark.parametrize("budget", [None, Budget(mode="per-growth")], ids=str)
def test_l2_init_measures_new_units_from_their_start(budget: Budget | None) -> None:
    """Right after a growth that re-initialises units, these are at their first values."""
    loop = Loop("moe", "l2-init", strength=1.0, lr=0.05, budget=budget)
    first = weights(loop.model)
    loop.run(3)
    now = weights(loop.model)
    loop.controller.grow(3, batch(0))
    outside = sum(loops(now[n] - first[n]) for n in now if not n.startswith("3."))
    shared = sum(loops(now[n] - first[n]) for n in now if n.startswith("3.shared"))
    kept = float(loop.intervention.penalty()) - outside - shared
    inside = sum(loops(now[n] - first[n]) for n in now if n.startswith("3.")) - shared
    assert -1e-4 < kept < 0.9 * inside


@pytest.mark.parametrize("network", NETWORKS)
def test_parseval(network: str) -> None:
    model, intervention = attached(network, "parseval", strength=0.3, scale=2.0)
    shaken(model)
    hidden = {"mlp": ["1.weight", "3.weight"], "conv": ["0.weight", "4.weight", "7.weight"],
              "moe": ["1.weight", *[f"3.{b}.{w}" for b in ("bank", "shared")
                                    for w in ("w_in", "w_out")]]}[network]  # fmt: skip
    parameters, total = dict(model.named_parameters()), 0.0
    for name in hidden:
        rows = [row.flatten().tolist() for row in parameters[name]]
        for i, one in enumerate(rows):
            for j, two in enumerate(rows):
                product = math.fsum(a * b for a, b in zip(one, two, strict=True))
                total += (product - (2.0 if i == j else 0.0)) ** 2
    assert float(intervention.penalty()) == pytest.approx(0.3 * total, rel=1e-11)


def test_parseval_makes_rows_orthogonal() -> None:
    def away(name: str, **options: Any) -> float:
        loop = Loop("mlp", name, **options).run(150)
        weight = loop.model[1].weight.detach()  # type: ignore[index]
        return float((weight @ weight.T - torch.eye(12)).norm())

    assert away("parseval", strength=1.0) < 0.3 < 1.0 < away("none")


def test_parseval_of_one_layer_is_nothing() -> None:
    intervention, model = make("parseval"), nn.Linear(3, 2)
    intervention.attach(model, torch.optim.SGD(model.parameters(), 0.1), seeded())
    assert float(intervention.penalty()) == 0.0


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("power", [1, 2])
def test_spectral_settles_at_the_largest_singular_values(network: str, power: int) -> None:
    model, intervention = attached(network, "spectral", strength=0.3, power=power)
    shaken(model)
    for _ in range(1000):
        intervention.penalty()
    total = 0.0
    for name, p in model.named_parameters():
        if name.endswith(("w_in", "w_out")) or (p.dim() > 1 and name.endswith("weight")):
            if "router" not in name:
                total += (float(torch.linalg.svdvals(p.flatten(1))[0]) ** power - 1) ** 2
        elif name.endswith(("bias", "b_in")):
            normal = network == "conv" and name in ("1.bias", "8.bias")
            total += 0.0 if normal else loops(p) ** power
        elif name.endswith("weight"):
            total += (float(p.abs().max()) ** power - 1) ** 2
    penalty = intervention.penalty()
    assert float(penalty) == pytest.approx(0.3 * total, rel=1e-6)
    penalty.backward()  # type: ignore[union-attr]
    for p in model.parameters():  # of a largest singular value: rank one
        if p.dim() == 2 and p.grad is not None and p.grad.any():
            assert torch.linalg.matrix_rank(p.grad, rtol=1e-6) == 1


def test_spectral_iterates_once_per_step() -> None:
    model, intervention = attached("mlp", "spectral")
    weight = model[1].weight.detach()  # type: ignore[index]
    u = intervention.vectors[0]  # type: ignore[attr-defined]
    intervention.penalty()
    v = weight.T @ u / (weight.T @ u).norm()
    expected = weight @ v / (weight @ v).norm()
    assert torch.allclose(intervention.vectors[0], expected)  # type: ignore[attr-defined]


def test_spectral_keeps_singular_values_near_one() -> None:
    def largest(name: str, **options: Any) -> float:
        weight = Loop("mlp", name, lr=0.05, **options).run(80).model[3].weight  # type: ignore[index]
        return abs(float(torch.linalg.svdvals(weight.detach())[0]) - 1)

    assert largest("spectral", strength=3.0) < 0.1 < 0.3 < largest("none")

"""Shrink and perturb, FIRE, DASH and head resets: what a task start does to the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from intervention_helpers import NETWORKS, Loop, seeded, weights
from torch import Tensor, nn

from dynmoe.interventions.perturbing import exact_polar, polar
from dynmoe.interventions.weights import fresh_draw
from dynmoe.moe import MoELayer


def acted(network: str, name: str, steps: int = 4, **options: Any) -> tuple[Loop, dict, dict]:
    """A loop at a task start; weights before and after."""
    loop = Loop(network, name, **options)
    loop.model.double()
    loop.optimizer = torch.optim.Adam(loop.model.parameters(), 0.01)
    loop.intervention.attach(loop.model, loop.optimizer, seeded(2))
    g = seeded(8)
    with torch.no_grad():
        for p in loop.model.parameters():
            p += torch.randn(p.shape, generator=g, dtype=p.dtype)
    before = weights(loop.model)
    loop.intervention.task_starts(1, lambda: [(x.double(), y) for x, y in loop.batches()])
    return loop, before, weights(loop.model)


# ---------------------------------------------------------------- shrink and perturb


@pytest.mark.parametrize("network", NETWORKS)
def test_shrink_perturb(network: str) -> None:
    torch.manual_seed(0)
    loop, before, after = acted(network, "shrink-perturb", shrink=0.7, sigma=0.1)
    new = fresh_draw(loop.model, seeded(2))
    for name, value in after.items():
        expected = [
            0.7 * a + 0.1 * b
            for a, b in zip(
                before[name].flatten().tolist(), new[name].flatten().tolist(), strict=True
            )
        ]
        assert value.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_shrink_perturb_with_normal_noise() -> None:
    _, before, after = acted("mlp", "shrink-perturb", shrink=0.5, sigma=0.1, noise="normal")
    added = torch.cat([(after[n] - 0.5 * before[n]).flatten() / 0.1 for n in after])
    assert len(added) > 400
    assert abs(float(added.mean())) < 0.15 and float(added.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("network", NETWORKS)
def test_shrink_towards_the_first_weights(network: str) -> None:
    loop = Loop(network, "shrink-perturb", shrink=0.2, towards_init=True)
    first = weights(loop.model)
    loop.run(4)
    before = weights(loop.model)
    loop.intervention.task_starts(1, None)
    for name, value in weights(loop.model).items():
        assert torch.allclose(value, 0.2 * before[name] + 0.8 * first[name], atol=1e-6)


def test_every_counts_steps_and_leaves_task_starts_alone() -> None:
    for name in ("shrink-perturb", "fire", "head-reset"):
        loop, calls = Loop("mlp", name, every=3), []
        loop.intervention.act = lambda: calls.append(loop.intervention.steps)  # type: ignore[attr-defined, method-assign]  # noqa: B023
        loop.run(10)
        assert calls == [3, 6, 9]
        loop, calls = Loop("mlp", name), []
        loop.intervention.act = lambda: calls.append(loop.intervention.steps)  # type: ignore[attr-defined, method-assign]  # noqa: B023
        loop.run(10)
        assert calls == [4, 8]


# ---------------------------------------------------------------- FIRE


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
def test_polar_is_that_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=seeded(1), dtype=torch.double)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(polar(matrix, 60), u @ v, atol=1e-10)
    assert torch.allclose(exact_polar(matrix), u @ v, atol=1e-12)
    for zeros in (polar(torch.zeros(2, 3), 10), exact_polar(torch.zeros(2, 3))):
        assert torch.equal(zeros, torch.zeros(2, 3))


def test_what_ten_iterations_reach_is_as_the_docstring_says() -> None:
    wide = torch.rand(128, 784, generator=seeded(0)) - 0.5
    assert (torch.linalg.svdvals(polar(wide, 10)) - 1).abs().max() < 1e-3
    least = [
        float(
            torch.linalg.svdvals(polar(torch.rand(128, 128, generator=seeded(i)) - 0.5, 10)).min()
        )
        for i in range(20)
    ]
    assert sorted(least)[3] > 0.001 and max(least) < 0.1
    values = torch.tensor([0.999, 0.04, 1e-4], dtype=torch.double)
    reached = polar((values / values.norm()).diag(), 10).diagonal()
    assert (reached[:2] - 1).abs().max() < 1e-2
    assert reached[2] == pytest.approx(1.5**10 * 1e-4, rel=1e-3)


@pytest.mark.parametrize("shape", [(128, 128), (10, 64), (64, 27)])
@pytest.mark.parametrize("condition", [1e1, 1e5])
def test_the_exact_factor_is_orthogonal_however_ill_conditioned(
    shape: tuple[int, int], condition: float
) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=seeded(2)), full_matrices=False)
    spread = torch.logspace(0, -math.log10(condition), min(shape))
    matrix = u * spread @ v
    assert (torch.linalg.svdvals(exact_polar(matrix)) - 1).abs().max() < 1e-4
    assert (torch.linalg.svdvals(polar(matrix, 10)) - 1).abs().max() > 1e-2 or condition < 1e2


def newton_schulz(w: Tensor, iterations: int) -> Tensor:
    """As the paper has it, one matrix, written out from the other side."""
    x = w / math.sqrt(float((w * w).sum()))
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.T) @ x
    return x


@pytest.mark.parametrize("network", NETWORKS)
def test_fire(network: str) -> None:
    _, before, after = acted(network, "fire", iterations=7)
    changed = set()
    for name, old in before.items():
        if old.dim() < 2 or "router" in name or "b_out" in name:
            assert torch.equal(after[name], old)
            continue
        changed.add(name)
        scale = math.sqrt(old.shape[0] / old.shape[1])
        if old.dim() == 2:
            assert torch.allclose(after[name], scale * newton_schulz(old, 7), atol=1e-10)
            continue
        height, width = old.shape[2:]
        for i in range(height):
            for j in range(width):
                tap = scale / (height * width) * newton_schulz(old[:, :, i, j], 7)
                assert torch.allclose(after[name][:, :, i, j], tap, atol=1e-10)
    assert len(changed) == {"mlp": 3, "conv": 4, "moe": 6}[network]


@pytest.mark.parametrize("options", [{"iterations": 40}, {"factor": "svd"}])
def test_fire_leaves_all_singular_values_alike(options: dict[str, Any]) -> None:
    _, _, after = acted("mlp", "fire", **options)
    for name in ("1.weight", "3.weight", "5.weight"):
        values = torch.linalg.svdvals(after[name])
        out, into = after[name].shape
        assert torch.allclose(values, torch.full_like(values, math.sqrt(out / into)), atol=1e-6)


# ---------------------------------------------------------------- DASH


def directions(model: nn.Module, batches: list, alpha: float) -> dict[str, Tensor]:
    """Averaged descent directions, with `.grad` and in evaluation mode."""
    model.eval()
    average = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for name, p in model.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            average[name] = (1 - alpha) * average[name] - alpha * gradient
    model.zero_grad()
    return average


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.flatten().tolist(), b.flatten().tolist()
    dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
    norms = math.sqrt(math.fsum(p * p for p in x) * math.fsum(q * q for q in y))
    return dot / norms if norms else 0.0


@pytest.mark.parametrize("network", NETWORKS)
def test_dash(network: str) -> None:
    alpha, least = 0.4, 0.1
    torch.manual_seed(0)
    loop, before, after = acted(network, "dash", alpha=alpha, least=least)
    torch.manual_seed(0)
    twin = Loop(network, "none").model.double()
    twin.load_state_dict(loop.model.state_dict())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(before[name])
    given = directions(twin, [(x.double(), y) for x, y in loop.batches()], alpha)
    factors = []
    for name, old in before.items():
        norm = network == "conv" and name.startswith(("1.", "8."))
        if norm or "router" in name or "b_out" in name:
            assert torch.equal(after[name], old)
            continue
        parts = {1: [()], 2: [(i,) for i in range(len(old))]}.get(old.dim())
        if parts is None:
            parts = [(i, j) for i in range(old.shape[0]) for j in range(old.shape[1])]
        for at in parts:
            factor = min(max(cosine(given[name][at], old[at]), least), 1.0)
            assert torch.allclose(after[name][at], factor * old[at], atol=1e-10)
            factors.append(factor)
    assert min(factors) == least < max(factors)


def test_dash_leaves_all_but_weights_alone() -> None:
    loop = Loop("conv", "dash").run(4)
    state = {n: b.clone() for n, b in loop.model.named_buffers()}
    random = torch.get_rng_state()
    loop.intervention.task_starts(1, loop.batches)
    assert all(torch.equal(b, state[n]) for n, b in loop.model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random) and loop.model.training


# ---------------------------------------------------------------- head reset


@pytest.mark.parametrize("to", ["first", "zeros"])
def test_head_reset(to: str) -> None:
    loop = Loop("moe", "head-reset", to=to)
    first = weights(loop.model)
    loop.run(4)
    before, head = weights(loop.model), loop.model[4]  # type: ignore[index]
    assert head.weight in loop.optimizer.state
    loop.intervention.task_starts(1, None)
    after = weights(loop.model)
    for name, value in after.items():
        if not name.startswith("4."):
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(value, first[name] if to == "first" else torch.zeros_like(value))
    assert head.weight not in loop.optimizer.state
    assert isinstance(loop.model[3], MoELayer)  # type: ignore[index]
    loop.run(6)
    assert not torch.equal(head.weight, after["4.weight"])
    assert int(loop.optimizer.state[head.weight]["step"]) == 2


def test_a_frozen_head_is_not_reset() -> None:
    loop = Loop("mlp", "head-reset", every=1, to="zeros")
    loop.model[5].weight.requires_grad_(False)  # type: ignore[index]
    before = weights(loop.model)
    loop.run(2)
    assert torch.equal(loop.model[5].weight, before["5.weight"])  # type: ignore[index]
    assert not loop.model[5].bias.any()  # type: ignore[index]

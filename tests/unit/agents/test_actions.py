"""Distributions over actions against torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, distributions

from agents.actions import ActionDistribution, DiagonalGaussian, distribution_over
from dynmoe.errors import UserError

SPACES: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 5, 3]),
    "table": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(-2, 2, (3,), np.float32),
    "box64": spaces.Box(-1, 5, (2, 2), np.float64),
    "scalar": spaces.Box(0, 1, (), np.float32),
    "free": spaces.Box(-np.inf, np.inf, (2,), np.float32),
}


def made(kind: str, count: int = 6) -> tuple[ActionDistribution, Tensor, Tensor]:
    """The distribution of a space, and two sets of outputs [count, P]."""
    distribution = distribution_over(SPACES[kind])
    if isinstance(distribution, DiagonalGaussian):
        with torch.no_grad():
            distribution.log_std.copy_(torch.linspace(-1, 0.5, distribution.outputs))
    g = torch.Generator().manual_seed(1)
    return distribution, *torch.randn(2, count, distribution.outputs, generator=g).unbind()


def references(
    kind: str, distribution: ActionDistribution, parameters: Tensor
) -> list[distributions.Distribution]:
    """torch's distribution of each choice or coordinate."""
    space = SPACES[kind]
    if isinstance(space, spaces.Box):
        mean, log_std = parameters.chunk(2, dim=1)
        pairs = zip(mean.unbind(1), log_std.exp().unbind(1), strict=True)
        return [distributions.Normal(m, s) for m, s in pairs]
    sizes = {
        "discrete": [4], "multi-discrete": [2, 5, 3], "table": [2, 3, 4, 2], "multi-binary": [2] * 3
    }[kind]  # fmt: skip
    assert distribution.outputs == sum(sizes)
    return [distributions.Categorical(logits=part) for part in parameters.split(sizes, dim=1)]


@pytest.mark.parametrize("kind", SPACES)
def test_probabilities_entropy_and_divergence(kind: str) -> None:
    distribution, outputs, others = made(kind)
    old, new = distribution(outputs), distribution(others)
    actions = distribution.sample(old, torch.Generator().manual_seed(0))
    assert actions.shape == (6, *(SPACES[kind].shape or ())) and actions.dtype == distribution.dtype
    flat = actions.reshape(6, -1).unbind(1)
    parts, changed = references(kind, distribution, old), references(kind, distribution, new)
    log_probs, entropy = distribution.evaluate(old, actions)
    expected = sum(p.log_prob(a) for p, a in zip(parts, flat, strict=True))
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, sum(p.entropy() for p in parts))
    kl = sum(distributions.kl_divergence(p, q) for p, q in zip(parts, changed, strict=True))
    torch.testing.assert_close(distribution.divergence(old, new), kl)
    assert (distribution.divergence(old, old).abs() < 1e-6).all()
    torch.testing.assert_close(distribution.loss(outputs, actions), -log_probs.mean())


@pytest.mark.parametrize("kind", SPACES)
def test_samples_have_the_distribution(kind: str) -> None:
    distribution, outputs, _ = made(kind, 1)
    parameters = distribution(outputs).expand(20_000, -1)
    actions = distribution.sample(parameters, torch.Generator().manual_seed(3)).reshape(20_000, -1)
    for part, drawn in zip(
        references(kind, distribution, parameters[:1]), actions.unbind(1), strict=True
    ):
        if isinstance(part, distributions.Normal):
            assert abs(drawn.mean() - part.mean) < 0.03
            assert abs(drawn.std() / part.stddev - 1) < 0.03
        else:
            shares = torch.bincount(drawn, minlength=part.probs.shape[1]) / 20_000
            assert (shares - part.probs[0]).abs().max() < 0.02


@pytest.mark.parametrize("kind", SPACES)
def test_uniform_actions(kind: str) -> None:
    """Whatever the parameters: all values equally often; standard normal where there is no end."""
    distribution, outputs, _ = made(kind, 1)
    space = SPACES[kind]
    parameters = distribution(outputs).expand(20_000, -1)
    actions, log_probs = distribution.uniform(parameters, torch.Generator().manual_seed(3))
    flat = actions.reshape(20_000, -1).double()
    if kind == "free":
        assert (flat.mean(dim=0).abs() < 0.03).all() and ((flat.std(dim=0) - 1).abs() < 0.03).all()
        normal = distributions.Normal(0.0, 1.0)
        torch.testing.assert_close(log_probs, normal.log_prob(actions).sum(dim=1))
        return
    if isinstance(space, spaces.Box):
        low, high = float(space.low.min()), float(space.high.max())
        assert low <= flat.min() and flat.max() <= high
        assert (flat.mean(dim=0) - (low + high) / 2).abs().max() < 0.03 * (high - low)
        options = (high - low) ** flat.shape[1]
    else:
        assert all(space.contains(action) for action in actions[:50].numpy())
        options = (
            float(np.prod(space.nvec if hasattr(space, "nvec") else [2] * 3))
            if kind != ("discrete")
            else 4.0
        )
        shares = torch.bincount(flat[:, -1].long()) / 20_000
        assert (shares - 1 / len(shares)).abs().max() < 0.02
    torch.testing.assert_close(log_probs, torch.full((20_000,), -math.log(options)))


def test_the_spread_is_learned_apart_from_the_state() -> None:
    distribution, outputs, _ = made("box")
    parameters = distribution(outputs)
    assert torch.equal(parameters[:, :3], outputs) and (parameters[:, 3:].std(dim=0) == 0).all()
    assert [name for name, _ in distribution.named_parameters()] == ["log_std"]
    distribution.evaluate(parameters, torch.zeros(6, 3))[0].sum().backward()
    assert distribution.log_std.grad is not None and distribution.log_std.grad.all()
    distribution.log_std.grad = None
    distribution.loss(outputs.requires_grad_(), torch.zeros(6, 3)).backward()
    assert distribution.log_std.grad is None


def test_choices_have_no_parameters() -> None:
    """Networks for discrete actions are saved as they always were."""
    assert not made("discrete")[0].state_dict() and not made("multi-discrete")[0].state_dict()


@pytest.mark.parametrize(
    "space",
    [spaces.Text(3), spaces.Box(0, 9, (2,), np.int64), spaces.Dict(a=spaces.Discrete(2)),
     spaces.Tuple((spaces.Discrete(2),))],
    ids=str,
)  # fmt: skip
def test_other_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(UserError, match="only Discrete, MultiDiscrete, MultiBinary and Box") as e:
        distribution_over(space)
    assert str(space) in str(e.value)


def test_random_actions_where_the_width_of_the_bounds_overflows() -> None:
    most = float(np.finfo(np.float32).max)
    distribution = distribution_over(spaces.Box(-most, most, (2,), np.float32))
    actions, log_p = distribution.uniform(torch.zeros(5, distribution.outputs), torch.Generator())
    assert actions.isfinite().all() and log_p.isfinite().all()

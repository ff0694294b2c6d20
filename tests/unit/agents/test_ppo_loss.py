"""PPO's loss, settings and minibatches against the plainest code for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import (
    SMALL,
    changed,
    seeded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents.ppo import (
    PPOSettings,
    minibatches,
    ppo_loss,
)
from dynmoe.errors import UserError

Batch = dict[str, Tensor]


def make_batch(
    size: int, actions: int, seed: int, spread: float = 1.0
) -> tuple[Tensor, Tensor, Batch]:
    """(logits, values, batch) in float32; `spread` says how far the policy has moved."""
    g = seeded(seed)
    old = torch.randn(size, actions, generator=g)
    chosen = torch.multinomial(old.softmax(1), 1, generator=g).squeeze(1)
    values, returns, advantages = torch.randn(3, size, generator=g).unbind()
    batch = {
        "actions": chosen,
        "log_probs": old.log_softmax(1)[range(size), chosen],
        "values": values,
        "advantages": 3 * advantages + 1,
        "returns": returns,
    }
    logits = old + spread * torch.randn(size, actions, generator=g)
    return logits, values + spread * torch.randn(size, generator=g), batch


def naive_loss(
    logits: Tensor, values: Tensor, batch: Batch, s: PPOSettings
) -> tuple[float, list[float]]:
    """The paper's formulas sample by sample, in Python's floats."""
    size = len(values)
    advantages = batch["advantages"].tolist()
    if s.normalise_advantage and size > 1:
        mean = sum(advantages) / size
        deviation = math.sqrt(sum((g - mean) ** 2 for g in advantages) / (size - 1))
        advantages = [(g - mean) / deviation for g in advantages]
    policy = value = entropy = kl = share = 0.0
    for i in range(size):
        row = [math.exp(x) for x in logits[i].tolist()]
        p = [x / sum(row) for x in row]
        ratio = p[int(batch["actions"][i])] / math.exp(float(batch["log_probs"][i]))
        clipped = min(max(ratio, 1 - s.clip), 1 + s.clip)
        policy -= min(ratio * advantages[i], clipped * advantages[i]) / size
        new, old, target = (float(x[i]) for x in (values, batch["values"], batch["returns"]))
        error = (new - target) ** 2
        if s.clip_value:
            error = max(error, (old + min(max(new - old, -s.clip), s.clip) - target) ** 2)
        value += error / 2 / size
        entropy -= sum(q * math.log(q) for q in p) / size
        kl += (ratio - 1 - math.log(ratio)) / size
        share += (clipped != ratio) / size
    loss = policy + s.value_weight * value - s.entropy * entropy
    return loss, [policy, value, entropy, kl, share]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 9),
    st.integers(2, 6),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.5, 2.0]),
    st.sampled_from([0.05, 0.2, 0.7]),
    st.booleans(),
    st.booleans(),
)
def test_loss_is_that_of_loops(
    size: int, actions: int, seed: int, spread: float, clip: float, clips_value: bool, scales: bool
) -> None:
    logits, values, batch = make_batch(size, actions, seed, spread)
    s = changed(clip=clip, clip_value=clips_value, normalise_advantage=scales, entropy=0.3,
                value_weight=0.7)  # fmt: skip
    loss, parts = ppo_loss(logits, values, batch, s)
    expected_loss, expected = naive_loss(logits, values, batch, s)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-4, abs=1e-5)
    assert [float(p) for p in parts] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_gradient_is_the_policy_gradient_where_nothing_has_changed() -> None:
    logits, values, batch = make_batch(32, 5, 0, spread=0.0)
    logits.requires_grad_(True)
    s = changed(entropy=0.0, value_weight=0.0, normalise_advantage=False)
    loss, parts = ppo_loss(logits, values, batch, s)
    (gradient,) = torch.autograd.grad(loss, logits)
    chosen = logits.log_softmax(1)[range(32), batch["actions"]]
    (expected,) = torch.autograd.grad(-(batch["advantages"] * chosen).mean(), logits)
    torch.testing.assert_close(gradient, expected)
    assert float(parts[3]) == pytest.approx(0, abs=1e-6) and float(parts[4]) == 0
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("step", [-1.0, -0.1, 0.1, 1.0])
def test_no_gradient_beyond_the_clip_and_a_full_one_on_the_way_back(
    advantage: float, step: float
) -> None:
    """Pessimism: a ratio that has moved too far in the advantage's direction earns nothing more."""
    logits = torch.tensor([[step, 0.0]], requires_grad=True)
    batch = {name: torch.zeros(1) for name in ("values", "returns")}
    batch |= {"actions": torch.tensor([0]), "advantages": torch.tensor([advantage])}
    batch["log_probs"] = torch.tensor([math.log(0.5)])
    s = changed(entropy=0.0, value_weight=0.0)
    (gradient,) = torch.autograd.grad(ppo_loss(logits, torch.zeros(1), batch, s)[0], logits)
    too_far = step * advantage > 0 and abs(step) == 1.0  # ratio 1.46 or 0.54, and gaining
    assert bool((gradient == 0).all()) == too_far


def test_value_may_not_run_ahead() -> None:
    """Beyond the clip there is no gradient towards the return, but one back to it."""
    batch = make_batch(4, 3, 0)[2] | {
        "values": torch.zeros(4), "returns": torch.tensor([5.0, 5.0, -5.0, 0.5]),
    }  # fmt: skip
    values = torch.tensor([1.0, 0.1, 1.0, 1.0], requires_grad=True)
    s = changed(clip=0.2, value_weight=1.0, entropy=0.0)
    logits = torch.zeros(4, 3)
    (gradient,) = torch.autograd.grad(ppo_loss(logits, values, batch, s)[0], values)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -4.9, 6.0, 0.5]) / 4)
    free = changed(clip_value=False, value_weight=1.0, entropy=0.0)
    (gradient,) = torch.autograd.grad(ppo_loss(logits, values, batch, free)[0], values)
    torch.testing.assert_close(gradient, torch.tensor([-4.0, -4.9, 6.0, 0.5]) / 4)


def test_advantages_are_scaled_within_the_minibatch() -> None:
    logits, values, batch = make_batch(16, 4, 3)
    moved = batch | {"advantages": 100 * batch["advantages"] - 7}
    one, other = (ppo_loss(logits, values, b, SMALL)[0] for b in (batch, moved))
    torch.testing.assert_close(one, other)
    plain = changed(normalise_advantage=False)
    one, other = (ppo_loss(logits, values, b, plain)[0] for b in (batch, moved))
    assert not torch.isclose(one, other)
    same = batch | {"advantages": torch.full((16,), 3.0)}  # no deviation to divide by
    assert torch.isfinite(ppo_loss(logits, values, same, SMALL)[0])


def test_entropy_and_kl_of_known_distributions() -> None:
    """The mean over the old policy's samples of Schulman's estimator is KL(old || new)."""
    old, new = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.3, 0.5])
    actions = torch.tensor([0, 0, 1, 2])  # as often as `old` has them
    batch = make_batch(4, 3, 0)[2] | {"actions": actions, "log_probs": old.log()[actions]}
    _, parts = ppo_loss(new.log().expand(4, 3) + 7, torch.zeros(4), batch, changed(clip=0.5))
    entropy, kl, share = (float(part) for part in parts[2:])
    assert entropy == pytest.approx(-(new * new.log()).sum().item(), rel=1e-5)
    assert kl == pytest.approx((old * (old / new).log()).sum().item(), rel=1e-5)
    assert share == 0.75  # ratios 0.4, 0.4, 1.2, 2
    uniform = ppo_loss(torch.zeros(4, 8), torch.zeros(4), batch, SMALL)[1][2]
    assert float(uniform) == pytest.approx(math.log(8))
    sure = torch.zeros(4, 8)
    sure[:, 0] = 200.0  # all other probabilities underflow
    assert float(ppo_loss(sure, torch.zeros(4), batch, SMALL)[1][2]) == 0


def test_every_epoch_deals_out_every_sample_once() -> None:
    s = changed(num_envs=6, rollout_steps=10, epochs=3, minibatches=4)
    dealt = list(minibatches(s, seeded(1)))
    assert [len(index) for index in dealt] == [15] * 12
    orders = [torch.cat(dealt[4 * epoch : 4 * epoch + 4]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(60)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    again, other = (torch.cat(list(minibatches(s, seeded(seed)))) for seed in (1, 2))
    assert torch.equal(torch.cat(dealt), again) and not torch.equal(again, other)


def test_sizes() -> None:
    s = PPOSettings(total_steps=1000, num_envs=3, rollout_steps=7, minibatches=3)
    assert (s.batch_size, s.updates) == (21, 47)  # 13 steps are left out
    s.check()
    PPOSettings().check()
    exactly = replace(s, total_steps=21)
    exactly.check()
    assert exactly.updates == 1


BAD: list[tuple[str, Any]] = [
    *((name, 0) for name in ("num_envs", "rollout_steps", "epochs", "minibatches")),
    *((name, -1) for name in ("num_envs", "rollout_steps", "epochs", "minibatches")),
    *((name, -0.1) for name in ("lr", "gamma", "gae_lambda", "clip", "entropy", "value_weight",
                                "max_grad_norm", "adam_eps")),
    *((name, math.nan) for name in ("lr", "gamma", "gae_lambda", "clip", "entropy",
                                    "value_weight", "max_grad_norm", "adam_eps")),
    ("minibatches", 5), ("minibatches", 128), ("total_steps", 63), ("total_steps", -64),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_numbers_are_refused_by_name(name: str, value: Any) -> None:
    SMALL.check()
    with pytest.raises(UserError) as caught:
        changed(**{name: value}).check()
    message = str(caught.value)
    assert f"--{name.replace('_', '-')} {value}" in message and "\n" not in message


@pytest.mark.parametrize(("name", "value"), [("gamma", 1.01), ("gae_lambda", 1.5)])
def test_what_weighs_the_future_above_the_present_is_refused(name: str, value: float) -> None:
    changed(gamma=1.0, gae_lambda=1.0).check()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}"):
        changed(**{name: value}).check()

"""One update of PPO against the plainest code for it."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from common import (
    SMALL,
    changed,
    make_policy,
    moe_blocks,
    rollout_of,
    seeded,
    stages,
    weights,
)
from torch import Tensor, nn

from agents.actor_critic import ActorCritic
from agents.ppo import (
    PPOSettings,
    UpdateStats,
    learn,
)
from agents.rollout import Rollout, collect, estimate_advantages
from dynmoe.errors import NumericError
from dynmoe.moe import moe_layers
from dynmoe.moe.losses.balance import SwitchLoss
from envs.vector import TorchVectorEnv


def rolled(
    policy: ActorCritic, env: TorchVectorEnv, s: PPOSettings, seed: int = 0
) -> Rollout:  # fmt: skip
    observations, info = env.reset(seed=seed)
    return collect(env, policy, observations, info["floor"], s.rollout_steps, s.gamma, seeded(seed))


def naive_learn(
    policy: ActorCritic, optimizer: Any, rollout: Rollout, s: PPOSettings, env: TorchVectorEnv
) -> list[list[float]]:
    """PPO's update written out once more, with torch's distributions; figures of each step."""
    advantages = estimate_advantages(rollout, s.gamma, s.gae_lambda)
    returns, figures, generator = advantages + rollout.values, [], seeded(5)
    steps, envs = advantages.shape
    for _ in range(s.epochs):
        order = torch.randperm(steps * envs, generator=generator).tolist()
        size = steps * envs // s.minibatches
        for part in (order[i : i + size] for i in range(0, steps * envs, size)):
            at = [divmod(i, envs) for i in part]
            pick = lambda x, at=at: torch.stack([x[t, n] for t, n in at])  # noqa: E731
            logits, values = policy(env.unpack(pick(rollout.observations)))
            now = torch.distributions.Categorical(logits=logits)
            change = now.log_prob(pick(rollout.actions)) - pick(rollout.log_probs)
            advantage = pick(advantages)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            ratio = change.exp()
            surrogate = torch.min(ratio * advantage, ratio.clip(1 - s.clip, 1 + s.clip) * advantage)
            old, target = pick(rollout.values), pick(returns)
            near = torch.max(torch.min(values, old + s.clip), old - s.clip)
            error = torch.max((values - target) ** 2, (near - target) ** 2)
            entropy = now.entropy().mean()
            loss = -surrogate.mean() + s.value_weight * error.mean() / 2 - s.entropy * entropy
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in policy.parameters() if p.grad is not None]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for g in gradients:
                g *= min(1.0, s.max_grad_norm / float(norm))
            optimizer.step()
            kl, share = (ratio - 1 - change).mean(), ((ratio - 1).abs() > s.clip).float().mean()
            row = (-surrogate.mean(), error.mean() / 2, entropy, kl, share, norm)
            figures.append([float(x.detach()) for x in row])
    return figures


def test_update_is_that_of_the_plainest_code() -> None:
    env, s = stages(4), changed(lr=0.05, max_grad_norm=0.1, clip=0.1)
    policy = make_policy(env)
    rollout = rolled(policy, env, s)
    twin = copy.deepcopy(policy)
    optimizers = [torch.optim.Adam(p.parameters(), s.lr, eps=s.adam_eps) for p in (policy, twin)]
    figures = torch.tensor(naive_learn(twin, optimizers[1], rollout, s, env))
    stats = learn(policy, optimizers[0], rollout, s, env, seeded(5))
    assert len(figures) == 8
    for one, other in zip(policy.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    got = list(asdict(stats).values())
    assert got[:6] == pytest.approx(figures.mean(dim=0).tolist(), rel=1e-3, abs=1e-4)
    assert stats.clip_share > 0 and stats.grad_norm > s.max_grad_norm  # both clips were at work


def test_stats_by_hand_where_nothing_moves() -> None:
    env, s = stages(4), changed(lr=0.0, normalise_advantage=False, max_grad_norm=0.0)
    policy = make_policy(env)
    rollout = rolled(policy, env, s)
    advantages = estimate_advantages(rollout, s.gamma, s.gae_lambda)
    returns = advantages + rollout.values
    with torch.no_grad():
        logits, _ = policy(env.unpack(rollout.observations.flatten(0, 1)))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    stats = learn(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, s, env, seeded())
    expected = UpdateStats(
        policy_loss=-float(advantages.mean()), value_loss=float(advantages.square().mean() / 2),
        entropy=float(entropy), approx_kl=0.0, clip_share=0.0, grad_norm=stats.grad_norm,
        explained_variance=1 - float(advantages.var() / returns.var()),
    )  # fmt: skip
    assert asdict(stats) == pytest.approx(asdict(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("values", "expected"), [([3.0, 5.0], 1.0), ([4.0, 4.0], 0.0)])
def test_explained_variance_of_known_values(values: list[float], expected: float) -> None:
    """Episodes of one step that pay 3 and 5: those are the returns, whatever the values say."""
    env, s = stages(2), changed(num_envs=2, rollout_steps=2, minibatches=1, epochs=1)
    rollout = rollout_of(
        rewards=torch.tensor([[3.0, 5.0]] * 2), dones=torch.ones(2, 2, dtype=torch.bool),
        values=torch.tensor([values] * 2),
    )  # fmt: skip
    policy = make_policy(env)
    stats = learn(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, s, env, seeded())
    assert stats.explained_variance == pytest.approx(expected)
    rollout.rewards[:] = 3.0  # nothing to explain
    stats = learn(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, s, env, seeded())
    assert stats.explained_variance == 0.0


@pytest.mark.parametrize("limit", [0.01, 0.1, 0.0])
def test_gradient_is_clipped(limit: float) -> None:
    """One step of SGD with rate 1 moves the weights by the gradient."""
    env, s = stages(4), changed(epochs=1, minibatches=1, max_grad_norm=limit, entropy=0.0)
    policy = make_policy(env)
    rollout = rolled(policy, env, s)
    before = weights(policy)
    stats = learn(policy, torch.optim.SGD(policy.parameters(), 1.0), rollout, s, env, seeded())
    moved = [a - b for a, b in zip(weights(policy), before, strict=True)]
    norm = torch.cat([m.flatten() for m in moved]).norm()
    assert stats.grad_norm > 0.2
    assert float(norm) == pytest.approx(limit or stats.grad_norm, rel=1e-3)


@pytest.mark.parametrize("field", ["rewards", "log_probs", "values"])
def test_a_loss_that_is_no_number_changes_nothing(field: str) -> None:
    env = stages(4)
    policy = make_policy(env)
    rollout = rolled(policy, env, SMALL)
    getattr(rollout, field)[:] = math.nan
    optimizer = torch.optim.Adam(policy.parameters())
    before = weights(policy)
    with pytest.raises(NumericError, match=r"the loss is nan: a smaller --lr"):
        learn(policy, optimizer, rollout, SMALL, env, seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert not optimizer.state


class Kink(nn.Module):
    """Adds sqrt(x) at x = 0: a finite value whose gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sqrt()


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    env = stages(4)
    policy = make_policy(env)
    policy.critic.append(Kink())
    before = weights(policy)
    rollout = rolled(policy, env, SMALL)
    with pytest.raises(NumericError, match="gradient"):
        learn(policy, torch.optim.Adam(policy.parameters()), rollout, SMALL, env, seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_balance_loss_reaches_the_router_and_nothing_behind_it(weight: float) -> None:
    """With nothing to advantage, the routers' balance is all that there is to learn."""
    env = stages(4)
    policy = make_policy(env, make_block=moe_blocks(balance=SwitchLoss.Config(weight=weight)))
    s = changed(epochs=1, entropy=0.0, value_weight=0.0, normalise_advantage=False)
    rollout = rolled(policy, env, s)
    rollout.rewards.zero_()
    rollout.values.zero_()
    rollout.last_value.zero_()
    before = dict(zip([n for n, _ in policy.named_parameters()], weights(policy), strict=True))
    stats = learn(policy, torch.optim.SGD(policy.parameters(), 1.0), rollout, s, env, seeded())
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    routers = {f"{name}.router.weight" for name, _ in moe_layers(policy)}
    assert len(routers) == 2
    if weight:
        assert routers <= moved and not any("bank" in name for name in moved)
        assert stats.policy_loss == 0 and stats.grad_norm > 0
    else:
        assert not moved and stats.grad_norm == 0

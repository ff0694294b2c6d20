"""Action masks: probabilities, rollouts and updates in which some options are not allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from common import changed, make_policy, seeded
from gymnasium import spaces
from torch import Tensor

from agents.actions import distribution_over
from agents.ppo import learn
from agents.rollout import Rollout, collect
from dynmoe.errors import UserError
from envs.gym import GymEnv

SIZES = [2, 4, 3]


class Doors(gymnasium.Env):
    """Of 4 doors those are open whose number differs from the step's, modulo 4; a wrong one fails.

    `what` makes the mask wrong: "short", or "shut" from step 2 on; has it told in "step" alone; or
    as a "list", a "tuple" of parts, "text", a "dict", or of "none" of its entries.
    """

    observation_space = spaces.Box(0, 1, (4,), np.float32)
    action_space = spaces.Discrete(4, start=1)

    def __init__(self, what: str = "") -> None:
        self.what, self.time = what, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = int(self.np_random.integers(4))
        self.end = self.time + 5
        seen, info = self._see()
        return seen, {} if self.what == "step" else info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action - 1 != self.time % 4, "a shut door"
        self.time += 1
        return (*self._see()[:1], 1.0, self.time == self.end, False, self._see()[1])

    def _see(self) -> tuple[Any, dict[str, Any]]:
        allowed = np.arange(4) != self.time % 4
        if self.what == "shut" and self.time > 4:
            allowed[:] = False
        mask = allowed[:3] if self.what == "short" else allowed
        mask = mask.astype(np.int8)
        kinds = {"list": [bool(one) for one in mask], "tuple": (mask[:1], mask[1:]), "text": "1011",
                 "none": [1, None, 1, 1], "dict": {"door": mask}}  # fmt: skip
        return np.eye(4, dtype=np.float32)[self.time % 4], {
            "action_mask": kinds.get(self.what, mask)
        }


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    gymnasium.register("Doors-v0", Doors)
    yield
    del gymnasium.registry["Doors-v0"]


def rolled(env: GymEnv, policy: Any, uniform: bool = False) -> Rollout:
    observations, info = env.reset(seed=3)
    return collect(env, policy, observations, info["floor"], 16, 0.9, seeded(), uniform)


def test_masked_probabilities_are_those_of_the_options_left() -> None:
    """Against a distribution over the allowed options alone, choice by choice."""
    distribution = distribution_over(spaces.MultiDiscrete(SIZES))
    outputs = torch.randn(50, sum(SIZES), generator=seeded(1)).requires_grad_()
    allowed = torch.rand(50, sum(SIZES), generator=seeded(2)) < 0.5
    for part in allowed.split(SIZES, dim=1):
        part[:, 1] = True
    logits = distribution.masked(outputs, allowed)
    actions = distribution.sample(logits, seeded(3))
    log_probs, entropies = distribution.evaluate(logits, actions)
    drawn, drawn_log_p = distribution.uniform(outputs, seeded(4), allowed)
    for i in range(50):
        log_p = entropy = even = 0.0
        parts = zip(outputs[i].split(SIZES), allowed[i].split(SIZES), strict=True)
        for k, (own, may) in enumerate(parts):
            left = may.nonzero().flatten().tolist()
            weights = {j: float(own[j].detach().exp()) for j in left}
            p = {j: w / sum(weights.values()) for j, w in weights.items()}
            assert int(drawn[i, k]) in p
            log_p += np.log(p[int(actions[i, k])])
            entropy -= sum(x * np.log(x) for x in p.values())
            even -= np.log(len(left))
        assert log_probs[i].item() == pytest.approx(log_p, abs=1e-5)
        assert distribution.log_prob(logits, actions)[i].item() == pytest.approx(log_p, abs=1e-5)
        assert entropies[i].item() == pytest.approx(entropy, abs=1e-5)
        assert float(drawn_log_p[i]) == pytest.approx(even, abs=1e-5)
    (log_probs.sum() + entropies.sum()).backward()
    assert isinstance(outputs.grad, Tensor) and outputs.grad.isfinite().all()
    assert (outputs.grad[~allowed] == 0).all() and (outputs.grad[allowed] != 0).any()


@pytest.mark.parametrize("uniform", [False, True])
def test_rollouts_keep_the_masks_and_obey_them(uniform: bool) -> None:
    env = GymEnv("Doors-v0", 6)
    rollout = rolled(env, make_policy(env), uniform)
    assert rollout.masks is not None and len(rollout.episodes) > 6
    open_doors = rollout.observations == 0  # what is shown is the door that is shut
    assert torch.equal(rollout.masks, open_doors)
    chosen = rollout.masks.gather(2, rollout.actions.unsqueeze(2))
    assert chosen.all() and len(rollout.actions.unique()) == 4


def test_the_policy_that_learns_is_the_masked_one() -> None:
    """Ratios start at 1; and the entropy is that over three doors."""
    env, s = GymEnv("Doors-v0", 4), changed(num_envs=4, rollout_steps=16, lr=0.0, minibatches=2)
    policy = make_policy(env)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    stats = learn(policy, optimizer, rolled(env, policy), s, env, seeded())
    assert abs(stats.approx_kl) < 1e-6 and stats.clip_share == 0
    assert 0.5 < stats.entropy < np.log(3) + 1e-5


def test_the_mask_is_saved_with_the_episodes() -> None:
    env = GymEnv("Doors-v0", 3)
    rolled(env, make_policy(env))
    other = GymEnv("Doors-v0", 3)
    other.load_state_dict(env.state_dict())
    assert other.action_mask is not None and env.action_mask is not None
    assert torch.equal(other.action_mask, env.action_mask)
    actions = env.action_mask.int().argmax(dim=1)
    assert torch.equal(env.step(actions)[0], other.step(actions)[0])
    assert torch.equal(other.action_mask, env.action_mask)


@pytest.mark.parametrize("what", ["list", "tuple", "step"])
def test_masks_of_other_kinds_and_of_steps_alone(what: str) -> None:
    """Where a reset tells of none, all is allowed until the first step."""
    env = GymEnv("Doors-v0", 3, env_args={"what": what})
    seen, _ = env.reset(seed=3)
    shut = seen.argmax(dim=1)
    for _ in range(12):
        told = env.action_mask
        if told is not None:
            starts = env.length == 0
            assert torch.equal(told, seen == 0) or (what == "step" and told[starts].all())
            assert torch.equal(told[~starts], (seen == 0)[~starts])
        seen, *_ = env.step((shut + 1) % 4)
        shut = seen.argmax(dim=1)
    assert env.action_mask is not None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", "has 3 entries, .*has 4 options"),
        ("shut", "allows nothing at step [1-9]"),
        ("text", "of number 0 .* is no list of numbers; give 4 entries of 0 or 1"),
        ("none", "is no list of numbers"),
        ("dict", "is no list of numbers"),
    ],
)
def test_masks_that_cannot_be(what: str, message: str) -> None:
    env = GymEnv("Doors-v0", 2, env_args={"what": what})
    policy = make_policy(env)
    with pytest.raises(UserError, match=message) as error:
        rolled(env, policy)
    assert "environment Doors-v0" in str(error.value)

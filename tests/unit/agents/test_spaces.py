"""PPO learns in every kind of action space, and grows there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from common import Silent
from gymnasium import spaces

from agents.experiment import ReinforcementLearning
from agents.growth import policy_shock, signals
from agents.making import make_env, make_policy
from agents.ppo import train
from agents.settings import Config
from dynmoe import registry, seeding
from dynmoe.lab.runner import run_one

TARGETS: dict[str, tuple[spaces.Space, Any]] = {
    "box": (spaces.Box(-1, 1, (2,), np.float32), np.array([0.5, -0.5])),
    "free": (spaces.Box(-np.inf, np.inf, (1,), np.float64), np.array([1.0])),
    "multi-discrete": (spaces.MultiDiscrete([3, 4], start=[0, 2]), np.array([2, 3])),
    "multi-binary": (spaces.MultiBinary(3), np.array([1, 0, 1])),
    "shifted": (spaces.Discrete(4, start=3), np.array(5)),
}


class Guess(gymnasium.Env):
    """Pays minus the distance to one action, or to its mirror image, as a sign tells; 8 steps."""

    observation_space = spaces.Dict(
        sign=spaces.Box(-1, 1, (1,), np.float64), turn=spaces.Discrete(2)
    )

    def __init__(self, kind: str) -> None:
        self.action_space, self.target = TARGETS[kind]

    def _show(self) -> dict[str, Any]:
        self.sign = self.np_random.choice([-1.0, 1.0])
        return {"sign": np.array([self.sign]), "turn": int(self.steps % 2)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps += 1
        turned = isinstance(self.action_space, spaces.Box) and self.sign < 0
        wrong = np.abs(np.asarray(action) - (-self.target if turned else self.target)).mean()
        return self._show(), -float(min(wrong, 5.0)), False, self.steps == 8, {}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Its id."""
    gymnasium.register("Guess-v0", Guess)  # type: ignore[arg-type]
    yield
    del gymnasium.registry["Guess-v0"]


def settings(kind: str, **changes: Any) -> Config:
    config = Config(
        env="Guess-v0", env_args=f'{{"kind": "{kind}"}}', num_envs=8, rollout_steps=32,
        total_steps=8192, minibatches=4, epochs=4, lr=5e-3, gamma=0.0, entropy=0.0,
        encoder=registry.get("encoder", "mlp").Config(hidden=16, widths=(16,)),
        method=registry.get("agent", "dense").Config(),
    )  # fmt: skip
    return replace(config, **changes)


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", TARGETS)
def test_it_learns(kind: str) -> None:
    config = settings(kind)
    device = torch.device("cpu")
    env = make_env(config, device)
    policy = make_policy(config, env, device, config.intervention.build())
    optimizer = torch.optim.Adam(policy.parameters(), config.lr)
    silent = Silent()
    observations, info = env.reset(seed=0)
    train(env, policy, optimizer, config, 0, silent, observations, info["floor"])
    rewards = [float(rollout.rewards.mean()) for rollout in silent.rollouts]
    assert np.mean(rewards[-3:]) > 0.35 * np.mean(rewards[:2]) + 1e-6, rewards
    first = silent.rollouts[0]
    assert first.actions.shape == (32, 8, *(env.single_action_space.shape or ()))
    assert signals(0, first, 1, 0.0).reached == (1.0,)
    env.close()


@pytest.mark.parametrize("kind", ["box", "multi-discrete"])
@pytest.mark.parametrize("method", ["dynamicmoe", "random"])
def test_whole_runs(kind: str, method: str, tmp_path: Path) -> None:
    """Growth, plasticity metrics, figures and checkpoints."""
    config = settings(
        kind, total_steps=1024, method=registry.get("agent", method).Config(), probe_every=2,
        trigger=registry.get("trigger", "at").Config(steps=(512,)), runs_dir=tmp_path, name="x",
    )  # fmt: skip
    done = run_one(ReinforcementLearning(), "", config)
    folder, summary = done.folder, done.summary
    assert (folder / "log.jsonl").is_file() and summary["final_return"] < 0
    if method == "dynamicmoe":
        assert [event["experts"] for event in summary["growth"]] == [2]
        assert all(np.isfinite(value) for value in summary["growth"][0]["shock"].values())


def test_the_shock_of_a_growth_is_that_of_the_distribution() -> None:
    config = settings("box")
    env = make_env(config, torch.device("cpu"))
    policy = make_policy(config, env, torch.device("cpu"), config.intervention.build())
    with torch.no_grad():
        parameters, values = policy(env.unpack(env.reset()[0]))
    moved = parameters.clone()
    moved[:, :2] += 0.5  # half a deviation in each of two coordinates: KL = 2 * 0.5^2 / 2
    shock = policy_shock((parameters, values), (moved, values + 2), None, policy.distribution)
    assert shock["policy_kl"] == pytest.approx(0.25, rel=1e-4)
    assert shock["value_change"] == pytest.approx(2.0)
    env.close()


@pytest.mark.slow
def test_pendulum_learns_to_swing_up() -> None:
    """From about -1200 in an episode to above -600 within 50,000 steps."""
    config = settings(
        "box", env="Pendulum-v1", env_args="", rollout_steps=128, total_steps=51_200, epochs=10,
        minibatches=16, lr=1e-3, gamma=0.9, gae_lambda=0.95, normalize_observations=True,
        normalize_rewards=True,
        encoder=registry.get("encoder", "mlp").Config(hidden=64, widths=(64,)),
    )  # fmt: skip
    env = make_env(config, torch.device("cpu"))
    policy = make_policy(config, env, torch.device("cpu"), config.intervention.build())
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=config.adam_eps)
    silent = Silent()
    observations, info = env.reset(seed=0)
    with seeding.kept():
        train(env, policy, optimizer, config, 0, silent, observations, info["floor"])
    returns = [episode.episode_return for episode in silent.episodes]
    assert np.mean(returns[:32]) < -900 and np.mean(returns[-32:]) > -600
    env.close()

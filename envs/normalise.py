"""Observations and rewards of gymnasium's environments at a scale that networks like.

gymnasium's wrappers do the work: observations get mean 0 and deviation 1 by coordinate, rewards
are divided by the deviation of their discounted sum (Engstrom et al. 2020, arXiv 2005.12729,
Section 3). All environments share one set of statistics, and both are clipped to -10..10, as in
CleanRL and Stable-Baselines3. Episodic returns stay those of the rewards as they were given.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import NormalizeObservation, TransformObservation
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import ClipReward, NormalizeReward

LIMIT = 10.0


class Normaliser:
    """Wraps environments, and holds the statistics of their observations and rewards.

    Args:
        observations, rewards: what is normalised.
        gamma: discount of the sum whose deviation rewards are divided by.
    """

    def __init__(self, observations: bool, rewards: bool, gamma: float) -> None:
        self.observations, self.rewards, self.gamma = observations, rewards, gamma
        self.wrappers: list[NormalizeObservation | NormalizeReward] = []
        self.statistics: dict[str, RunningMeanStd] = {}
        self.given: _Given | None = None

    def wrap(self, env: gymnasium.Env) -> gymnasium.Env:
        """One environment, before it is put with the others."""
        if not self.observations:
            return env
        wrapper = NormalizeObservation(env)
        wrapper.obs_rms = self.statistics.setdefault("observations", wrapper.obs_rms)  # all share
        self.wrappers.append(wrapper)
        return TransformObservation(
            wrapper, lambda seen: np.clip(seen, -LIMIT, LIMIT), wrapper.observation_space
        )

    def wrap_all(self, envs: VectorEnv) -> VectorEnv:
        """All environments together."""
        if not self.rewards:
            return envs
        self.given = _Given(envs)
        wrapper = NormalizeReward(self.given, self.gamma)
        self.wrappers.append(wrapper)
        self.statistics["rewards"] = wrapper.return_rms
        return ClipReward(wrapper, -LIMIT, LIMIT)

    def rewards_given(self, rewards: np.ndarray) -> np.ndarray:
        """The latest rewards [N] as the environments gave them, of those that came out."""
        return rewards if self.given is None else self.given.rewards

    def state_dict(self) -> dict[str, Any]:
        """The statistics in use, as tensors and plain values."""
        return {
            name: {
                "mean": torch.from_numpy(np.array(statistics.mean)),
                "var": torch.from_numpy(np.array(statistics.var)),
                "count": float(statistics.count),
            }
            for name, statistics in self.statistics.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        for name, statistics in self.statistics.items():
            saved = state[name]
            statistics.mean, statistics.var = saved["mean"].numpy(), saved["var"].numpy()
            statistics.count = saved["count"]

    def freeze(self) -> None:
        """Use the statistics as they are from now on."""
        for wrapper in self.wrappers:
            wrapper.update_running_mean = False


class _Given(VectorWrapper):
    """Keeps the latest rewards [N] as they are before normalisation."""

    rewards: np.ndarray

    def step(self, actions: Any) -> tuple[Any, ...]:
        """One step."""
        result = self.env.step(actions)
        self.rewards = np.array(result[1])
        return result

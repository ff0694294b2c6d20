"""What the tests of PPO and its parts share: small environments and policies, and naive sums."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

import agents.methods
from agents.actor_critic import ActorCritic, MakeBlock, dense_block
from agents.encoders import MLP
from agents.ppo import PPOSettings, UpdateStats, train
from agents.rollout import Episode, Rollout
from dynmoe import seeding
from dynmoe.growth.settings import GrowthSettings
from envs.debug import Stages
from envs.vector import Info, TorchVectorEnv

SMALL = PPOSettings(
    total_steps=1024, num_envs=4, rollout_steps=16, epochs=2, minibatches=4, lr=1e-3
)


class Counter(TorchVectorEnv):
    """Counts the steps of each environment, episodes of given lengths, and does what it is told.

    An observation is (environment, steps so far in all, steps in this episode), float32; steps pay
    1, 2, 4, ..., 128, 1, ... whatever the action, and episode k lasts `lengths[k]` steps (the last
    entry again and again). Odd environments end their episodes by truncation, even ones by
    termination; with `both`, odd ones by both at once.
    """

    def __init__(self, num_envs: int, lengths: Sequence[int], both: bool = False) -> None:
        self.num_envs, self.lengths, self.both = num_envs, list(lengths), both
        self.device = torch.device("cpu")
        self.input_shape = (3,)
        low = np.zeros(3, np.float32)
        self.single_observation_space = spaces.Box(low, low + 1e6, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = spaces.Discrete(2)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.reset()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        self.steps = 0
        self.length = torch.zeros(self.num_envs, dtype=torch.long)
        self.score = torch.zeros(self.num_envs)
        self.episode = 0
        return self._observe(), {"floor": torch.zeros_like(self.length)}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        reward = torch.full((self.num_envs,), 2.0 ** (self.steps % 8))
        self.steps += 1
        self.length += 1
        self.score += reward
        ends = int(self.length[0]) == self.lengths[min(self.episode, len(self.lengths) - 1)]
        done = torch.full((self.num_envs,), ends)
        odd = torch.arange(self.num_envs) % 2 == 1
        final = self._observe()
        info = {
            "final_obs": final,
            "_final_obs": done,
            "episode": {"r": self.score.clone(), "l": self.length.clone(),
                        "deepest": torch.zeros_like(self.length)},
            "_episode": done,
            "achievements": torch.zeros(self.num_envs, 0, dtype=torch.bool),
            "floor": torch.zeros_like(self.length),
        }  # fmt: skip
        if ends:
            self.length.zero_()
            self.score.zero_()
            self.episode += 1
        return self._observe(), reward, done & (~odd | self.both), done & odd, info

    def unpack(self, observations: Tensor) -> Tensor:
        return observations

    def state_dict(self) -> dict[str, Any]:
        names = ("steps", "length", "score", "episode")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        vars(self).update(copy.deepcopy(state))
        return self._observe()

    def _observe(self) -> Tensor:
        steps = torch.full((self.num_envs,), float(self.steps))
        return torch.stack([torch.arange(self.num_envs).float(), steps, self.length.float()], dim=1)


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.stats: list[UpdateStats | None] = []
        self.updates: list[int] = []

    def update_done(self, update: int, rollout: Rollout, stats: UpdateStats | None) -> None:
        self.updates.append(update)
        self.rollouts.append(rollout)
        self.stats.append(stats)

    @property
    def episodes(self) -> list[Episode]:
        return [episode for rollout in self.rollouts for episode in rollout.episodes]


def make_policy(
    env: TorchVectorEnv,
    seed: int = 0,
    hidden: int = 16,
    make_block: MakeBlock = dense_block,
    **options: Any,
) -> ActorCritic:
    """A small MLP actor-critic for an environment."""
    config = MLP.Config(hidden=hidden, widths=(16,), **options)
    with seeding.seeded(seed, "policy"):
        return ActorCritic(config, env.input_shape, env.num_actions, make_block)


def moe_blocks(granularity: int = 2, seed: int = 0, **settings: Any) -> MakeBlock:
    """MoE layers that have room for one growth, made as the growing agent makes them."""
    agent = agents.methods.DynamicMoE.Config().build()
    return agent.make_block(growth_settings(granularity, **settings), steps=1000, seed=seed)


def growth_settings(granularity: int = 2, **settings: Any) -> GrowthSettings:
    """Growth once in 1000 steps."""
    from dynmoe.growth.triggers.clock import AtTrigger

    trigger = settings.pop("trigger", AtTrigger.Config(steps=(500,)))
    return GrowthSettings(granularity=granularity, trigger=trigger, **settings)


def stages(num_envs: int = 4, seed: int = 0, name: str = "Stages-v0") -> TorchVectorEnv:
    """A debug environment."""
    return Stages(name, num_envs, seed)


def run(
    env: TorchVectorEnv,
    policy: ActorCritic,
    settings: PPOSettings,
    seed: int = 0,
    **how: Any,
) -> tuple[Silent, torch.optim.Optimizer]:
    """Train from the environment's reset; returns what was observed, and the optimizer."""
    optimizer = torch.optim.Adam(policy.parameters(), settings.lr, eps=settings.adam_eps)
    observer = Silent()
    observations, info = env.reset(seed=seed)
    train(env, policy, optimizer, settings, seed, observer, observations, info["floor"], **how)
    return observer, optimizer


def rollout_of(**fields: Any) -> Rollout:
    """A rollout with the given fields [T, N]; the others are zero."""
    steps, envs = next(v for n, v in fields.items() if n not in ("gates", "episodes")).shape[:2]
    zero = torch.zeros(steps, envs)
    whole: dict[str, Any] = {
        "observations": torch.zeros(steps, envs, 2, dtype=torch.uint8),
        "actions": zero.long(),
        "log_probs": zero,
        "values": zero,
        "rewards": zero,
        "dones": zero.bool(),
        "last_value": zero[0],
        "next_observations": torch.zeros(envs, 2, dtype=torch.uint8),
        "floors": zero.long(),
        "next_floors": zero[0].long(),
        "gates": {},
        "episodes": [],
    }
    return Rollout(**whole | fields)


def seeded(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def changed(**changes: Any) -> PPOSettings:
    """SMALL with other values."""
    return replace(SMALL, **changes)


def weights(policy: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in policy.parameters()]

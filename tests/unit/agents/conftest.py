"""What the tests of playing, figures and videos share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor

from agents.actor_critic import ActorCritic
from dynmoe import registry, seeding
from dynmoe.growth.settings import GrowthSettings
from envs.debug import SYMBOLS, Stages
from envs.vector import Info, TorchVectorEnv

COLORS = torch.tensor([[200, 40, 40], [40, 160, 60], [50, 60, 220]], dtype=torch.uint8)
"""Of the floors of a Corridor."""


class Corridor(TorchVectorEnv):
    """Five cells, two to a floor, seen as images of 9 x 15 pixels in blocks of 3 x 3.

    Action 1 walks ahead, 0 back. An episode ends in the last cell, alone on its floor, with return
    1, or after 24 steps: the longest are not those that get deepest. Packed it is seen as [cell].
    """

    def __init__(self, num_envs: int, seed: int = 0) -> None:
        self.num_envs, self.num_floors, self.max_return = num_envs, 3, 1.0
        self.device, self.input_shape = torch.device("cpu"), (3, 9, 15)
        self.achievements = ("end",)
        low = np.zeros(1, np.uint8)
        self.single_observation_space = spaces.Box(low, low + np.uint8(4), dtype=np.uint8)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = spaces.Discrete(2)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.reset()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        self.cell, self.length, self.deepest = torch.zeros(3, self.num_envs, dtype=torch.long)
        return self._observe(), {"floor": self.cell // 2}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        self.cell = (self.cell + 2 * actions - 1).clamp(0)
        self.length = self.length + 1
        self.deepest = torch.maximum(self.deepest, self.cell // 2)
        terminated = self.cell == 4
        truncated = (self.length == 24) & ~terminated
        done = terminated | truncated
        info: Info = {
            "final_obs": self._observe(), "_final_obs": done, "_episode": done,
            "episode": {"r": terminated.float(), "l": self.length, "deepest": self.deepest},
            "achievements": terminated[:, None],
        }  # fmt: skip
        alive = (~done).long()
        self.cell, self.length, self.deepest = (
            x * alive for x in (self.cell, self.length, self.deepest)
        )
        info["floor"] = self.cell // 2
        return self._observe(), terminated.float(), terminated, truncated, info

    def unpack(self, observations: Tensor) -> Tensor:
        """The floor's colour everywhere, and beneath a white block at the cell."""
        cell = observations[:, 0].long()
        blocks = COLORS[cell // 2][:, :, None, None].repeat(1, 1, 3, 5)
        blocks[torch.arange(len(cell)), :, 2, cell] = 255
        images = blocks.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
        return images.contiguous(memory_format=torch.channels_last)

    def state_dict(self) -> dict[str, Any]:
        return {"cell": self.cell, "length": self.length, "deepest": self.deepest}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        vars(self).update(state)
        return self._observe()

    def _observe(self) -> Tensor:
        return self.cell[:, None].to(torch.uint8)


@pytest.fixture
def corridor() -> TorchVectorEnv:
    """Ten environments that show images."""
    return Corridor(10)


def growing_policy(env: TorchVectorEnv) -> ActorCritic:
    """An untrained actor-critic whose two MoE layers hold 2 experts of 4."""
    trigger = registry.get("trigger", "at").Config(steps=(500,))
    growth = GrowthSettings(granularity=2, trigger=trigger)
    agent = registry.get("agent", "dynamicmoe").Config().build()
    make_block = agent.make_block(growth, steps=1000, seed=0)
    encoder = registry.get("encoder", "mlp").Config(hidden=32, widths=(32,))
    with seeding.seeded(0, "policy"):
        return ActorCritic(encoder, env.input_shape, env.num_actions, make_block)


@pytest.fixture(scope="session")
def skilled() -> ActorCritic:
    """A policy with MoE layers that is right on Stages-v0 most of the time, told what is right.

    Most of its episodes reach the last floor, some time out before, and they differ in length.
    """
    env = Stages("Stages-v0", 1)
    policy = growing_policy(env)
    states = torch.cartesian_prod(torch.arange(3), torch.arange(SYMBOLS)).to(torch.uint8)
    right = states.long().sum(dim=1) % SYMBOLS
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    for _ in range(100):
        loss = F.cross_entropy(policy(env.unpack(states))[0], right, label_smoothing=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@pytest.fixture
def stroller(corridor: TorchVectorEnv) -> ActorCritic:
    """A policy with MoE layers for the corridor, who has not learnt its way."""
    return growing_policy(corridor)

"""Small environments that are solved in seconds, to test agents and growth with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from dynmoe import seeding
from envs.vector import Actions, Info, TorchVectorEnv, step_info

GAMES = {"Identity-v0": 1, "Stages-v0": 3}
"""Name -> number of floors."""
SYMBOLS = 4
TO_NEXT_FLOOR = 6
LONGEST_EPISODE = 32


class Stages(TorchVectorEnv):
    """Say the right word: on floor f, symbol s asks for action (s + f) mod 4, and pays 1.

    Six right actions lead one floor down; behind the last floor the episode ends (terminated), and
    after 32 steps it is cut off (truncated). With one floor it lasts 32 steps: SB3's IdentityEnv.
    Observations are the bytes (floor, symbol), unpacked to a one-hot vector each.

    Args:
        name: "Identity-v0" (1 floor) or "Stages-v0" (3 floors, each another task).
        num_envs, seed, device: as for all environments.
    """

    def __init__(
        self, name: str, num_envs: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.num_envs, self.seed = name, num_envs, seed
        self.device = torch.device(device)
        self.num_floors = GAMES[name]
        self.achievements = tuple(f"enter_floor_{f}" for f in range(1, self.num_floors))
        self.max_return = float(LONGEST_EPISODE if self.num_floors == 1 else 6 * self.num_floors)
        self.input_shape = (self.num_floors + SYMBOLS,)
        high = np.array([self.num_floors - 1, SYMBOLS - 1], dtype=np.uint8)
        shown = spaces.Box(np.zeros(2, np.uint8), high, dtype=np.uint8)
        self.set_spaces(shown, spaces.Discrete(SYMBOLS))
        self._start(seed)
        self.started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Start new episodes: all over again with a seed, else with the next random numbers."""
        if seed is not None or not self.started:
            self._start(self.seed if seed is None else seed)
        else:
            self._begin()
        self.started = True
        return self._observe(), {"floor": self.floor.clone()}

    def step(self, actions: Actions) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments with actions [N]."""
        right = self.as_actions(actions).to(self.device) == (self.symbol + self.floor) % SYMBOLS
        reward = right.float()
        self.score += reward
        self.length += 1
        self.progress += right
        climbs = (self.progress == TO_NEXT_FLOOR) & (self.num_floors > 1)
        self.progress[climbs] = 0
        terminated = climbs & (self.floor == self.num_floors - 1)
        self.floor += (climbs & ~terminated).long()
        truncated = (self.length == LONGEST_EPISODE) & ~terminated
        done = terminated | truncated
        self.symbol: Tensor = self._draw()
        final = self._observe()
        stages = torch.arange(1, self.num_floors, device=self.device)
        ended = (self.score.clone(), self.length.clone(), self.floor.clone())
        unlocked = self.floor.unsqueeze(1) >= stages
        for value in (self.floor, self.progress, self.length, self.score):
            value[done] = 0
        info = step_info(final, done, *ended, unlocked, self.floor.clone())
        return self._observe(), reward, terminated, truncated, info

    def unpack(self, observations: Tensor) -> Tensor:
        """One-hot floor and symbol, float32 [B, floors + 4]."""
        floor, symbol = observations.long().unbind(1)
        parts = [F.one_hot(floor, self.num_floors), F.one_hot(symbol, SYMBOLS)]
        return torch.cat(parts, dim=1).float()

    def state_dict(self) -> dict[str, Any]:
        """Counters and the generator."""
        names = ("floor", "symbol", "progress", "length", "score")
        return {name: getattr(self, name).cpu().clone() for name in names} | {
            "generator": self.generator.get_state()
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Restore `state_dict()`; returns the present observations [N, 2]."""
        self.generator.set_state(state["generator"])
        for name in state.keys() - {"generator"}:
            setattr(self, name, state[name].to(self.device).clone())
        self.started = True
        return self._observe()

    def _start(self, seed: int) -> None:
        self.generator = seeding.generator(seed, self.name)
        self._begin()

    def _begin(self) -> None:
        """New episodes everywhere."""
        counts = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self.floor, self.progress, self.length = counts.clone(), counts.clone(), counts.clone()
        self.score = counts.float()
        self.symbol = self._draw()

    def _draw(self) -> Tensor:
        """Next symbols [N]."""
        drawn = torch.randint(SYMBOLS, (self.num_envs,), generator=self.generator)
        return drawn.to(self.device)

    def _observe(self) -> Tensor:
        return torch.stack([self.floor, self.symbol], dim=1).to(torch.uint8)

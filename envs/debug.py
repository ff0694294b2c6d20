"""Small environments that are solved in seconds, to test agents and growth with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from dynmoe import seeding
from dynmoe.errors import UserError
from envs.vector import Actions, Info, TorchVectorEnv, count_of, step_info, whole

GAMES = {"Identity-v0": 1, "Stages-v0": 3}
"""Name -> number of floors."""
SYMBOLS = 4
"""actions; and symbols of a floor, unless others are asked for"""
TO_NEXT_FLOOR = 6
LONGEST_EPISODE = 32


@dataclass(frozen=True, kw_only=True)
class StagesOptions:
    """What can be changed about the game; `--env-args` of the command line."""

    need: int = 0
    """right actions in a row that lead one floor down; 0: six in all"""
    floors: int = 0
    """number of floors; 0 for the game's own"""
    symbols: int = SYMBOLS
    """symbols of each floor"""
    sights: int = 0
    """numbers that show a symbol, where every floor has symbols of its own; 0: one-hot vectors of
    floor and symbol, and the same symbols everywhere"""
    longest: int = LONGEST_EPISODE
    """steps after which an episode is cut off"""
    first: int = 0
    """floor that episodes begin on"""

    def check(self, name: str) -> StagesOptions:
        """With the game's own number of floors filled in.

        Raises:
            UserError: names the option that cannot be.
        """
        values = {option: whole(value) for option, value in asdict(self).items()}
        if values["floors"] == 0:
            values["floors"] = GAMES[name]

        def check(**bounds: tuple[int, int]) -> None:
            for option, (low, high) in bounds.items():
                value = values[option]
                if not isinstance(value, int) or not low <= value <= high:
                    raise UserError(
                        f"{name}: {option}={value!r} must be in {low}..{high}, a whole number"
                    )

        check(floors=(1, 256), symbols=(1, 256), sights=(0, 4096), longest=(1, 10**9))
        check(need=(0, values["longest"]), first=(0, values["floors"] - 1))
        if values["need"] and values["floors"] == 1:
            raise UserError(f"{name}: need={self.need} leads nowhere with one floor; leave it out")
        return StagesOptions(**values)


class Stages(TorchVectorEnv):
    """Say the right word: on floor f, symbol s asks for action (s + f) mod 4, and pays 1.

    Six right actions lead one floor down; behind the last floor the episode ends (terminated), and
    after 32 steps it is cut off (truncated). With one floor it lasts 32 steps: SB3's IdentityEnv.
    Observations are the bytes (floor, symbol), unpacked to a one-hot vector each.

    With `need`, later floors come only after learning: so many right actions in a row lead on, a
    wrong one sets the row back to 0, and a right one pays 1 where the row is the longest yet on
    this floor. So nothing is gained by staying, and an episode returns at most need x floors, and 1
    a step. Of actions at random, 5 % of episodes of 64 steps leave the first floor at need 5, 1 %
    at need 6.
    With `sights`, each floor shows symbols of its own, as vectors of standard normal numbers that
    belong to the game, not to the seed: what is learnt of one floor neither helps nor stays apart.

    All environments share one generator. A part of them draws for all and takes its own.

    Args:
        name: "Identity-v0" (1 floor) or "Stages-v0" (3 floors, each another task).
        num_envs, seed, device: as for all environments.
        part: (r, P) for the r-th of P equal parts of the N environments alone.
        options: fields of `StagesOptions`.

    Raises:
        UserError: an option that cannot be.
    """

    length: Tensor
    score: Tensor
    longest_row: Tensor
    by_env = ("floor", "symbol", "progress", "longest_row", "length", "score")

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
        **options: int,
    ) -> None:
        self.name, self.num_envs, self.seed = name, count_of(num_envs, part), seed
        self.part = part
        self.device = torch.device(device)
        self.options = StagesOptions(**options).check(name)
        self.need, self.first_floor = self.options.need or TO_NEXT_FLOOR, self.options.first
        self.num_floors = self.num_phases = self.options.floors
        self.achievements = tuple(f"enter_floor_{f}" for f in range(1, self.num_floors))
        most = self.options.longest
        if self.num_floors > 1:
            most = min(most, self.need * (self.num_floors - self.options.first))
        self.max_return = float(most)
        self.looks = self._looks().to(self.device)
        self.input_shape = tuple(self.looks.shape[1:])
        high = np.array([self.num_floors - 1, self.options.symbols - 1], dtype=np.uint8)
        shown = spaces.Box(np.zeros(2, np.uint8), high, dtype=np.uint8)
        self.set_spaces(shown, spaces.Discrete(SYMBOLS))
        self._start(seed)
        self.started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Start new episodes: all over again with a seed, else with the next random numbers.

        Returns observations [N, ...] and `floor` [N].
        """
        if seed is not None or not self.started:
            self._start(self.seed if seed is None else seed)
        else:
            self._begin()
        self.started = True
        return self._observe(), {"floor": self.floor.clone()}

    def step(self, actions: Actions) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments with actions [N]."""
        right = self.as_actions(actions).to(self.device) == (self.symbol + self.floor) % SYMBOLS
        self.progress += right
        reward = right.float()
        if self.options.need:
            self.progress[~right] = 0
            reward = (self.progress > self.longest_row).float()
            self.longest_row = torch.maximum(self.longest_row, self.progress)
        self.score += reward
        self.length += 1
        climbs = (self.progress == self.need) & (self.num_floors > 1)
        self.progress[climbs] = 0
        self.longest_row[climbs] = 0
        terminated = climbs & (self.floor == self.num_floors - 1)
        self.floor += (climbs & ~terminated).long()
        truncated = (self.length == self.options.longest) & ~terminated
        done = terminated | truncated
        self.symbol: Tensor = self._draw()
        final = self._observe()
        stages = torch.arange(1, self.num_floors, device=self.device)
        ended = (self.score.clone(), self.length.clone(), self.floor.clone())
        unlocked = self.floor.unsqueeze(1) >= stages
        for value in (self.progress, self.longest_row, self.length, self.score):
            value[done] = 0
        self.floor[done] = self.options.first
        info = step_info(final, done, *ended, unlocked, self.floor.clone())
        return self._observe(), reward, terminated, truncated, info

    def unpack(self, observations: Tensor) -> Tensor:
        """One-hot floor and symbol, float32 [B, floors + symbols]; or the symbols' sights."""
        floor, symbol = observations.long().unbind(1)
        return self.looks[floor * self.options.symbols + symbol]

    def on_phase(self, phase: int) -> Stages:
        """The same game in as many environments as there are in all, begun on that floor."""
        options = asdict(replace(self.options, first=phase))
        return Stages(self.name, self.whole, self.seed, self.device, **options)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the generator."""
        return {name: getattr(self, name).cpu().clone() for name in self.by_env} | {
            "generator": self.generator.get_state()
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Restore `state_dict()` of all; returns the present observations [N, 2] of these."""
        self.generator.set_state(state["generator"])
        for name in state.keys() - {"generator"}:
            setattr(self, name, state[name][self.rows].to(self.device).clone())
        self.started = True
        return self._observe()

    def _start(self, seed: int) -> None:
        self.generator = seeding.generator(seed, self.name)
        self._begin()

    def _begin(self) -> None:
        """New episodes everywhere."""
        counts = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self.floor = counts + self.options.first
        self.progress, self.longest_row, self.length = (counts.clone() for _ in range(3))
        self.score = counts.float()
        self.symbol = self._draw()

    def _looks(self) -> Tensor:
        """What each floor's symbols look like, in order: [floors * symbols, D]."""
        floors, symbols = self.num_floors, self.options.symbols
        if self.options.sights:
            own = seeding.generator(0, self.name, "sights")
            return torch.randn(floors * symbols, self.options.sights, generator=own)
        floor = F.one_hot(torch.arange(floors), floors).repeat_interleave(symbols, dim=0)
        symbol = F.one_hot(torch.arange(symbols), symbols).repeat(floors, 1)
        return torch.cat([floor, symbol], dim=1).float()

    def _draw(self) -> Tensor:
        """Next symbols [N]."""
        drawn = torch.randint(self.options.symbols, (self.whole,), generator=self.generator)
        return drawn[self.rows].to(self.device)

    def _observe(self) -> Tensor:
        return torch.stack([self.floor, self.symbol], dim=1).to(torch.uint8)

"""Craftax in phases: episodes begin on deeper and deeper floors, at known steps of training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynmoe.errors import UserError
from envs import craftax_kits
from envs.craftax import CraftaxVectorEnv, Worlds
from envs.vector import Actions, Info, whole

NAME = "Craftax-Phases-v1"
OPTIONS = ("observation", "max_timesteps", "floors", "steps")
"""what `--env-args` may hold"""


class CraftaxPhases(CraftaxVectorEnv):
    """N environments of full Craftax whose episodes begin on a floor that goes with the phase.

    In phase k, episodes begin on `floors[k]`, with what `envs.craftax_kits` says that a player
    would carry there; all rules are upstream's. When a phase's steps are over, all running episodes
    are cut off (truncated) with that step, so that the shift comes at once and everywhere. The last
    phase has no end. `info["phase"]` [N] int64 is the phase that the returned observations belong
    to; `info["floor"]` tells of the shift as it tells of arrivals. Achievements that the floor's
    kit brings count as unlocked in `info["achievements"]`; they have paid nothing.

    Args:
        num_envs, seed, device, renderer, env_device, max_timesteps, part: as for CraftaxVectorEnv.
        observation: "codes" (default), "pixels", "pixels-float", or "symbolic": the float vector.
        floors: where the episodes of each phase begin, each 0..8.
        steps: environment steps of a phase, over all environments together; one number for all
            phases or one for each. They end at the first step at which so many are done.

    Raises:
        UserError: any of these cannot be, or jax or craftax is not installed.
    """

    phase: int = 0

    def __init__(
        self,
        num_envs: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        observation: str | None = None,
        renderer: str = "fast",
        env_device: str = "auto",
        max_timesteps: int | None = None,
        floors: Sequence[int] = range(craftax_kits.FLOORS),
        steps: int | Sequence[int] = 1_000_000,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.floors, self.bounds = _floors(floors), _bounds(steps, len(floors))
        self.env_device, self._taken, self._cut, self._played = env_device, 0, False, 0
        self.num_phases = len(self.floors)
        symbolic = observation == "symbolic"
        super().__init__(
            f"Craftax-{'Symbolic' if symbolic else 'Pixels'}-v1", num_envs, seed, device,
            None if symbolic else observation, renderer, env_device, max_timesteps, part,
        )  # fmt: skip
        self.name = NAME
        self.max_return = None  # what is left to unlock differs from phase to phase

    @property
    def first_floor(self) -> int:  # type: ignore[override]
        """Where the episodes of the present phase begin."""
        return self.floors[self.phase]

    @property
    def phase_played(self) -> int:
        """The phase that the latest step was made in."""
        return self._played

    @property
    def stage_floors(self) -> list[int]:
        """Floor of each phase."""
        return self.floors

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Start new episodes: with a seed all over again, from phase 0; else in this phase.

        Returns observations [N, ...] and `floor` [N].
        """
        observations, info = super().reset(seed=seed, options=options)
        info["floor"] += self.first_floor
        return observations, info

    def step(self, actions: Actions) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments with actions [N]; the last of a phase ends all episodes."""
        before = self.first_floor
        phase = bisect_right(self.bounds, self._taken + self.whole)
        self._cut, self._played, self.phase = phase > self.phase, self.phase, phase
        observations, reward, terminated, truncated, info = super().step(actions)
        self._taken += self.whole
        info["floor"][info["_episode"]] = self.first_floor
        info["episode"]["deepest"] = info["episode"]["deepest"].clamp(min=before)
        info["phase"] = torch.full_like(info["floor"], phase)
        return observations, reward, terminated, truncated, info

    def on_phase(self, phase: int) -> CraftaxPhases:
        """As many environments as there are in all, of that phase alone."""
        observation = None if self.renderer == "fast" else self.observation
        return CraftaxPhases(
            self.whole, self.seed, self.device,
            "symbolic" if self.observation == "symbolic" else observation,
            self.renderer, self.env_device, self.max_timesteps, [self.floors[phase]],
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """As of CraftaxVectorEnv, and the phases with the steps done."""
        own = {"floors": list(self.floors), "bounds": list(self.bounds), "taken": self._taken}
        return super().state_dict() | {"phases": own}

    def phase_in(self, state: dict[str, Any]) -> int:
        """The phase of environments with that `state_dict()`: the newest that was reached."""
        return bisect_right(self.bounds, state["phases"]["taken"])

    def _resume(self, state: dict[str, Any]) -> None:
        saved = state["phases"]
        for name in ("floors", "bounds"):
            if saved[name] != getattr(self, name):
                raise UserError(
                    f"the saved environments have phases with {name} {saved[name]}, these have "
                    f"{getattr(self, name)}; use the same"
                )
        self._taken = saved["taken"]
        self.phase = self.phase_in(state)

    def _begin(self, seed: int) -> None:
        self._taken, self._cut, self.phase = 0, False, 0
        super()._begin(seed)

    def _longest(self) -> int:
        return 1 if self._cut else self.max_timesteps

    def _new_worlds(self, key: np.ndarray) -> Worlds:
        return PhaseWorlds(self, key)

    def _enter(self, rows: np.ndarray) -> Tensor:
        if isinstance(self._worlds, PhaseWorlds):
            self._worlds.go_to(self.first_floor)
        return super()._enter(rows)


class PhaseWorlds(Worlds):
    """Next worlds in which the player begins on `floor`, with what it would carry there."""

    def __init__(self, env: CraftaxPhases, key: np.ndarray) -> None:
        super().__init__(env._programs, env._jax_device, key, env.first)
        self.equip = craftax_kits.program(
            env.num_envs, env._jax_device.platform.replace("gpu", "cuda"), env._jax_device.id
        )
        self.floor = 0

    def go_to(self, floor: int) -> None:
        """Begin there from now on: worlds that are there already are made again."""
        if floor != self.floor:
            self.floor = floor
            self.there[:] = False

    def made(self) -> None:
        """Put the player where it begins."""
        self.worlds = {**self.worlds, **self.equip(self.worlds, np.int32(self.floor))}


def _floors(floors: Sequence[int]) -> list[int]:
    """Floors that are there."""
    last = craftax_kits.FLOORS - 1
    if not isinstance(floors, Sequence) or not len(floors):
        raise UserError(f"{NAME}: floors={floors!r} must name the floor of each phase, as [0, 1]")
    given = [whole(floor) for floor in floors]
    for phase, floor in enumerate(given):
        if not isinstance(floor, int) or not 0 <= floor <= last:
            raise UserError(
                f"{NAME}: phase {phase} begins on floor {floor!r}, and Craftax has floors 0 to "
                f"{last}"
            )
    return given


def _bounds(steps: int | Sequence[int], phases: int) -> list[int]:
    """Environment steps after which each phase but the last is over."""
    each = [whole(n) for n in (steps if isinstance(steps, Sequence) else [steps] * phases)]
    if len(each) != phases or not all(isinstance(n, int) and n >= 1 for n in each):
        raise UserError(
            f"{NAME}: steps={steps!r} must be one whole number, or one for each of the {phases} "
            "phases, of at least 1"
        )
    return list(accumulate(each[:-1]))

"""Any gymnasium environment as a TorchVectorEnv."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from dynmoe import seeding
from dynmoe.errors import NumericError, UserError
from envs.copying import restore, state_of
from envs.vector import Actions, Info, TorchVectorEnv, options_of, step_info
from envs.wrappers import Normaliser, as_array, layout_of

LONGEST_SIDE = 320
"""of a picture; larger ones are reduced, as all of an episode are in memory at once"""
KINDS = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)
"""Action spaces that are arrays of numbers."""


class GymEnv(TorchVectorEnv):
    """Environments of gymnasium's registry, stepped one after another in this process.

    Those whose state is plain values are saved with it (`envs.copying`); when a run in others is
    resumed, their episodes start again. What they count starts at 0 here: actions of
    Discrete(3, start=2) are 0, 1 and 2. Where `info` holds an `action_mask` (Taxi), only what it
    allows is done.

    Args:
        name: a gymnasium id, such as "CartPole-v1"; "module:Name-v0" imports that module first.
        num_envs, seed, device: as for all environments.
        env_args: keyword arguments of the environment.
        normalize_observations, normalize_rewards, gamma: see `envs.wrappers`.

    Raises:
        UserError: it cannot be made, or shows what is neither a vector nor an image.
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        env_args: dict[str, Any] | None = None,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        gamma: float = 0.99,
    ) -> None:
        self.name, self.num_envs, self.seed, self.resets = name, num_envs, seed, 0
        self.device, self.env_args = torch.device(device), env_args or {}
        self.normaliser = Normaliser(normalize_observations, normalize_rewards, gamma)
        try:
            base: Any = gymnasium.make_vec(
                name, num_envs, "sync", wrappers=[self._prepared],
                vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}, **self.env_args,
            )  # fmt: skip
        except Exception as error:  # the id, an argument, a package, or its own code
            raise UserError(f"environment {name}: {_one_line(error)}") from error
        self.inner = [env.unwrapped for env in base.envs]
        self.made = [(env.observation_space, env.action_space) for env in self.inner]
        self.envs = self.normaliser.wrap_all(base)
        self.input_shape = self.layout.input_shape
        acts = self.envs.single_action_space
        if not isinstance(acts, KINDS):
            self.envs.close()
            kinds = ", ".join(kind.__name__ for kind in KINDS)
            raise UserError(f"environment {name}: its actions are {acts}, not one of {kinds}")
        self.first_action = getattr(acts, "start", 0)
        self.set_spaces(self.envs.single_observation_space, _from_zero(acts))
        self.score = torch.zeros(num_envs)
        self.length = torch.zeros(num_envs, dtype=torch.long)
        self.started, self.steps = False, 0
        self.seen: np.ndarray | None = None  # the latest observations

    @property
    def resumable(self) -> bool:
        """Whether all environments and wrappers are made of plain values."""
        return self._state() is not None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Start new episodes: all over again with a seed, else with the next random numbers.

        Returns observations [N, ...] and `floor` [N], all 0.
        """
        first = None
        if seed is not None or not self.started:
            seed = self.seed if seed is None else seed
            first = seeding.derive(seed, self.name, self.resets) % 2**31
        self.steps = 0
        observations, info = self._ask("reset", seed=first, options=options)
        self.action_mask = self._mask(info)
        self.started = True
        self.score.zero_()
        self.length.zero_()
        self._check_finite("observation", observations)
        self.seen = np.array(observations)
        floor = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return self._tensor(observations), {"floor": floor}

    def step(self, actions: Actions) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments with actions [N, ...].

        Raises:
            ValueError: actions of another shape or kind.
            NumericError: an observation or a reward is not finite.
        """
        chosen = self.as_actions(actions).numpy() + self.first_action
        chosen = chosen.astype(self.envs.single_action_space.dtype)
        self.steps += 1
        observations, reward, terminated, truncated, seen = self._ask("step", chosen)
        self.action_mask = self._mask(seen)
        done = torch.from_numpy(terminated | truncated)
        gained = np.asarray(reward, dtype=np.float32)
        given = np.asarray(self.normaliser.rewards_given(reward), dtype=np.float32)
        self._check_finite("reward", given)
        final = np.array(observations)
        ended = np.flatnonzero(terminated | truncated).tolist()
        for i in ended:
            final[i] = seen["final_obs"][i]
        self._check_finite("observation", final)
        self.seen = np.array(observations) if ended else final
        if ended:
            self._check_finite("observation", self.seen)
        self.score += torch.from_numpy(given)
        self.length += 1
        floor = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        info = step_info(
            self._tensor(final), done.to(self.device), self.score.to(self.device, copy=True),
            self.length.to(self.device, copy=True), deepest=floor, floor=floor,
            achievements=floor.new_zeros(self.num_envs, 0, dtype=torch.bool),
        )  # fmt: skip
        if ended:
            self.score[done] = 0
            self.length[done] = 0
        paid, died, cut_off = (
            torch.from_numpy(values).to(self.device) for values in (gained, terminated, truncated)
        )
        return self._tensor(observations), paid, died, cut_off, info

    def unpack(self, observations: Tensor) -> Tensor:
        """Images as [B, C, H, W], uint8 or float32 in 0..1, vectors as float32."""
        return self.layout.inputs(observations)

    def state_dict(self) -> dict[str, Any]:
        """How often the environments were started, statistics of what is normalised, and states.

        The last where they can be had: else `load_state_dict` starts new episodes.
        """
        state: dict[str, Any] = {"resets": self.resets}
        statistics = self.normaliser.state_dict()
        if statistics:
            state["normaliser"] = statistics
        inner = self._state() if self.started else None
        if inner is not None:
            assert self.seen is not None
            running = {"score": self.score.clone(), "length": self.length.clone()}
            state["episodes"] = {
                "envs": inner, "seen": torch.from_numpy(self.seen.copy()), "steps": self.steps,
                "mask": self.action_mask, **running,
            }  # fmt: skip
        return state

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Go on where `state_dict` was called; returns the present observations.

        Without states of the environments: start again, from another seed than before.
        """
        running, statistics = state.get("episodes"), state.get("normaliser", {})
        self.resets = state["resets"] + (running is None)
        self.normaliser.load_state_dict(statistics)
        first = self.reset(seed=self.seed)[0]
        if running is None:
            return first
        self.normaliser.load_state_dict(statistics)
        restore(self.envs, running["envs"])
        self.action_mask = running.get("mask")
        self.steps, self.seen = running["steps"], running["seen"].numpy().copy()
        self.score.copy_(running["score"])
        self.length.copy_(running["length"])
        return self._tensor(self.seen)

    @property
    def pictured(self) -> bool:
        """Whether observations are images, or there is gymnasium's render mode rgb_array."""
        return super().pictured or "rgb_array" in self.inner[0].metadata.get("render_modes", ())

    def filmed(self) -> TorchVectorEnv:
        """One environment in render mode rgb_array, with these statistics, where it is needed.

        Raises:
            UserError: it cannot be made.
        """
        if super().pictured:
            return self
        own = self.normaliser
        env = GymEnv(
            self.name, 1, self.seed, self.device, self.env_args | {"render_mode": "rgb_array"},
            own.observations, own.rewards, own.gamma,
        )  # fmt: skip
        env.normalise_as(self.state_dict())
        return env

    def pictures(self) -> Tensor | None:
        """What gymnasium renders, uint8 [N, H, W, 3], of at most 320 pixels a side.

        Where images are observed, these [N, ...] before normalisation; None: they are not scaled.

        Raises:
            UserError: it renders none, or a package for it is missing.
        """
        if super().pictured:
            raw = self.normaliser.raw()
            return None if raw is None else torch.from_numpy(raw).to(self.device)
        drawn = torch.from_numpy(np.stack(self._ask("render")))
        factor = -(-max(drawn.shape[1:3]) // LONGEST_SIDE)
        if factor == 1:
            return drawn
        small = F.avg_pool2d(drawn.movedim(-1, 1).float(), factor)
        return small.round().byte().movedim(1, -1)

    def images(self, pictures: Tensor) -> Tensor:
        """Images [B, C, H, W]."""
        return self.shown.inputs(pictures) if super().pictured else pictures.movedim(-1, 1)

    def normalise_as(self, state: dict[str, Any]) -> None:
        """Normalise by the statistics of that `state_dict()`, and leave them as they are."""
        self.normaliser.load_state_dict(state.get("normaliser", {}))
        self.normaliser.freeze()

    def close(self, **kwargs: Any) -> None:
        """Close the environments."""
        self.envs.close(**kwargs)

    def _prepared(self, env: gymnasium.Env) -> Any:
        """One environment whose observations are arrays, normalised if they are to be."""
        env = as_array(env)
        assert isinstance(env.observation_space, spaces.Box)  # as_array refuses others
        self.layout = self.shown = layout_of(env.observation_space)
        if self.normaliser.observations:
            self.layout = replace(self.layout, bounds=None)
        return self.normaliser.wrap(env)

    def _state(self) -> list[dict[str, Any]] | None:
        """Of all environments and wrappers, but for the statistics that they share."""
        return state_of(self.envs, self.normaliser.statistics.values())

    def _ask(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """Reset or step all environments.

        Raises:
            UserError: their own code fails, such as where a process of theirs has died, or they no
                longer have the spaces that they were made with.
        """
        try:
            given = getattr(self.envs, what)(*args, **kwargs)
        except Exception as error:
            self._check_spaces()
            raise UserError(
                f"environment {self.name}: {what} failed at step {self.steps}: {_one_line(error)}"
            ) from error
        self._check_spaces()
        return given

    def _check_spaces(self) -> None:
        """Stop at the first environment whose spaces are no longer those that all were made with.

        What stands between it and the agent was set up for these.
        """
        for i, (env, made) in enumerate(zip(self.inner, self.made, strict=True)):
            now = (env.observation_space, env.action_space)
            for what, one, first in zip(("observations", "actions"), now, made, strict=True):
                if one is not first and one != first:
                    raise UserError(
                        f"environment {self.name}: {what} of number {i} (of {self.num_envs}) were "
                        f"{first} and are {one} at step {self.steps}; spaces must stay the same"
                    )

    def _tensor(self, observations: np.ndarray) -> Tensor:
        """A copy on the device: gymnasium reuses its arrays."""
        return torch.from_numpy(np.array(observations)).to(self.device)

    def _mask(self, info: dict[str, Any]) -> Tensor | None:
        """The options allowed now, [N, P]: all of an environment that does not tell.

        Raises:
            UserError: it tells of another number of options, of no numbers, or allows none of a
                choice.
        """
        space = self.single_action_space
        if "action_mask" not in info or isinstance(space, spaces.Box):
            return None if self.action_mask is None else torch.ones_like(self.action_mask)
        sizes = np.broadcast_to(options_of(space), space.shape or ()).reshape(-1).tolist()
        rows, tell = info["action_mask"], info["_action_mask"]
        given = torch.ones(self.num_envs, sum(sizes), dtype=torch.bool)
        for i in np.flatnonzero(tell).tolist():
            row = _entries(rows[i] if isinstance(rows, np.ndarray) else rows)
            if row is None:
                raise UserError(
                    f"environment {self.name}: info['action_mask'] of number {i} (of "
                    f"{self.num_envs}) is no list of numbers; give {sum(sizes)} entries of 0 or 1"
                )
            if len(row) != sum(sizes):
                raise UserError(
                    f"environment {self.name}: info['action_mask'] has {len(row)} entries, and "
                    f"{space} has {sum(sizes)} options; give one entry for each"
                )
            given[i] = torch.from_numpy(row != 0)
        stuck = ~torch.stack([part.any(dim=1) for part in given.split(sizes, dim=1)]).all(dim=0)
        if bool(stuck.any()):
            number = f"number {int(stuck.int().argmax())} (of {self.num_envs})"
            raise UserError(
                f"environment {self.name}: info['action_mask'] of {number} allows nothing at step "
                f"{self.steps}; allow one option"
            )
        return given.to(self.device)

    def _check_finite(self, what: str, values: np.ndarray) -> None:
        """Stop at the first environment whose values [N, ...] are not finite."""
        finite = np.isfinite(values)
        if not finite.all():
            bad = ~finite.reshape(self.num_envs, -1)
            i = int(bad.any(axis=1).argmax())
            value = values.reshape(self.num_envs, -1)[i][bad[i]][0]
            raise NumericError(
                f"environment {self.name}: {what} of number {i} (of {self.num_envs}) is {value} at "
                f"step {self.steps}; rewards and observations must be finite"
            )


def _entries(mask: Any) -> np.ndarray | None:
    """The entries [P] of one environment's mask, or of one for each choice; None: no numbers."""
    try:
        if isinstance(mask, list | tuple):
            mask = np.concatenate([np.ravel(part) for part in mask])
        row = np.ravel(mask)
        return row if row.dtype.kind in "biuf" else None
    except ValueError:
        return None


def _from_zero(space: spaces.Space) -> spaces.Space:
    """The space of actions, counted from 0."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    return spaces.MultiDiscrete(space.nvec) if isinstance(space, spaces.MultiDiscrete) else space


def _one_line(error: Exception) -> str:
    """What went wrong, with the exception's kind where the text alone may not tell."""
    text = " ".join(str(error).split())
    known = isinstance(error, gymnasium.error.Error | UserError)
    return text if known else f"{type(error).__name__}: {text}"

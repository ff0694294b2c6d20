"""The contract between environments and agents: a gymnasium VectorEnv that speaks torch.

Shapes: N environments, A achievements. Tensors are on `device`.

`step` returns gymnasium's five values; episodes are reset within the step that ends them
(`AutoresetMode.SAME_STEP`), so the observation returned is the new episode's first. `info` holds

    final_obs       like the observations: those before any reset; the same where no episode ended
    _final_obs      [N] bool, which episodes ended in this step
    episode         {"r": [N] float32 return, "l": [N] int64 length, "deepest": [N] int64 deepest
                    floor} of the episodes that ended, meaningless elsewhere; `_episode` is the mask
    achievements    [N, A] bool, unlocked so far in the episode that this step belonged to
    floor           [N] int64, floor on which the returned observation was made

and `reset`'s info holds `floor` alone. `reset` starts all over again with a seed; without one it
goes on with the environment's random numbers, the first time with those of the seed it was made
with. Actions count from 0, and come as tensors, arrays or lists; those beyond a Box are clipped.

N environments may be a part of all that a run has, so that processes can share the play: `part`
says which. A part plays as its environments do among all. Where that cannot be, as all share
something that their steps move (gymnasium's running means), environments are always whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from dynmoe.errors import UserError

Info = dict[str, Any]
Actions = Tensor | np.ndarray | Sequence[Any]
"""[N, ...] one action per environment"""


def step_info(
    final: Tensor, done: Tensor, returns: Tensor, length: Tensor, deepest: Tensor,
    achievements: Tensor, floor: Tensor,
) -> Info:  # fmt: skip
    """The `info` of a step, of tensors as they are described above.

    achievements are bool [N, A], final has the observations' shape, the others are [N].
    """
    return {
        "final_obs": final,
        "_final_obs": done,
        "episode": {"r": returns, "l": length, "deepest": deepest},
        "_episode": done,
        "achievements": achievements,
        "floor": floor,
    }


class TorchVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """Base of all environments that agents train on.

    Attributes:
        name: as `envs.make` takes it.
        device: where observations, rewards and all else come out, and where actions may be.
        input_shape: shape of one unpacked observation, (C, H, W) or (D,).
        num_floors: stages the environment tells apart; 1 where it has none.
        first_floor: floor that episodes begin on; at present, where there are phases.
        phase: the present phase of an environment that has a plan of them, or None.
        num_phases: parts of training whose episodes begin elsewhere, or floors that episodes can be
            begun on, see `on_phase`; 1 where there are none.
        achievements: names of what an episode can unlock, in the order of `info["achievements"]`.
        action_mask: [N, P] bool, the options that the present states allow, those of each choice
            after another; None: all, always.
        max_return: the most an episode can return, or None where there is no such number.
        part: (r, P), these are the r-th of P equal parts of all environments; (0, 1): they are all.
        by_env: entries of `state_dict()` with rows by environment, in nests of dicts; those of a
            part are the same rows of all.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    device: torch.device
    input_shape: tuple[int, ...]
    num_floors: int = 1
    first_floor: int = 0
    num_phases: int = 1
    name: str
    phase: int | None = None
    achievements: tuple[str, ...] = ()
    action_mask: Tensor | None = None
    max_return: float | None = None
    part: tuple[int, int] = (0, 1)
    by_env: tuple[str, ...] = ()

    @property
    def whole(self) -> int:
        """How many environments there are in all."""
        return self.part[1] * self.num_envs

    @property
    def first(self) -> int:
        """The number of the first of these among all."""
        return self.part[0] * self.num_envs

    @property
    def rows(self) -> slice:
        """The places of these among all."""
        return slice(self.first, self.first + self.num_envs)

    def set_spaces(self, observation: spaces.Space, action: spaces.Space) -> None:
        """Set the spaces of one environment and of all `num_envs`."""
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space = batch_space(observation, self.num_envs)
        self.action_space = batch_space(action, self.num_envs)

    @property
    def resumable(self) -> bool:
        """Whether `state_dict` holds all that decides the rest of an episode."""
        return True

    @property
    def num_actions(self) -> int:
        """Discrete actions per environment."""
        return int(self.single_action_space.n)  # type: ignore[attr-defined]

    def as_actions(self, actions: Actions) -> Tensor:
        """Actions of any kind as a tensor [N, ...] on the CPU, those beyond a Box clipped.

        Raises:
            ValueError: another shape, no integers where the space counts, or a value that is not
                in it.
        """
        space, shape = self.single_action_space, list(self.action_space.shape or ())
        floats = isinstance(space, spaces.Box)
        if not isinstance(actions, Tensor):
            try:
                actions = torch.from_numpy(np.asarray(actions))
            except (TypeError, ValueError) as error:  # no numbers, or rows of different lengths
                raise ValueError(f"actions must be numbers {shape}: {error}") from None
        taken = actions.detach().cpu()
        if list(taken.shape) != shape or (taken.is_floating_point() and not floats):
            raise ValueError(
                f"actions must be {'numbers' if floats else 'integers'} {shape}, not "
                f"{taken.dtype} {list(taken.shape)}"
            )
        if isinstance(space, spaces.Box):
            if not taken.isfinite().all():
                raise ValueError(f"actions must be finite, not {taken.tolist()}")
            values = taken.to(torch.float32).numpy().astype(space.dtype)
            return torch.from_numpy(np.clip(values, space.low, space.high))
        taken = taken.long()
        most = torch.as_tensor(options_of(space)) - 1
        if not _between(taken, most):
            raise ValueError(f"actions must be in 0..{most.tolist()}, not {taken.tolist()}")
        return taken

    @abstractmethod
    def unpack(self, observations: Tensor) -> Tensor:
        """Stored observations [B, ...] as a network takes them: [B, *input_shape].

        Images are uint8 in 0..255 or float32 (0..1 where the environment's have bounds), with
        channels_last memory, vectors float32. Observations are kept packed because a frame's
        compact code is far smaller than the frame.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the environments' future depends on, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Restore `state_dict()` of all environments, where these are a part too.

        Returns the present observations [N, ...] of these.
        """

    def joined_state(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The `state_dict()` of all environments, from those of all parts in order."""
        rows = {name: _joined([part[name] for part in parts]) for name in self.by_env}
        return {**parts[0], **rows}

    @property
    def stage_floors(self) -> list[int]:
        """Floor of each stage that training may get to: those of the phases, or all floors."""
        return list(range(self.num_floors))

    def on_phase(self, phase: int) -> TorchVectorEnv:
        """As many environments whose episodes all begin as those of a phase, 0..num_phases - 1.

        Raises:
            UserError: these have no phases; worlds that do say here how one begins.
        """
        raise UserError(f"{self.name} has no phases; use Craftax-Phases-v1 or Stages-v0")

    @property
    def phase_played(self) -> int | None:
        """The phase that the latest step was made in, which may have ended it; None without any."""
        return self.phase

    def phase_in(self, state: dict[str, Any]) -> int | None:
        """The phase of environments with that `state_dict()`; None where `phase` is None."""
        return None

    @property
    def pictured(self) -> bool:
        """Whether `filmed` environments have pictures."""
        return len(self.input_shape) == 3

    def filmed(self) -> TorchVectorEnv:
        """These environments, or one like them that draws, where that has to be asked for."""
        return self

    def pictures(self) -> Tensor | None:
        """The present states as packed pictures [N, ...]; None: the observations are pictures."""
        return None

    def images(self, pictures: Tensor) -> Tensor:
        """Packed pictures [B, ...] as images [B, C, H, W], uint8 or float32 in 0..1."""
        return self.unpack(pictures)

    def normalise_as(self, state: dict[str, Any]) -> None:
        """Normalise by the statistics of that `state_dict()`, and leave them as they are."""


def whole(value: Any) -> Any:
    """A whole number that was written as a float, such as JSON's 1e6, is one; others stay."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def counted(name: str, value: Any) -> int:
    """A setting that counts.

    Raises:
        UserError: it is no whole number, or none that fits.
    """
    number = whole(value)
    if not isinstance(number, int) or not 1 <= number < 2**31:
        raise UserError(f"{name} {value!r} cannot be; use a whole number of 1 or more, below 2**31")
    return number


def count_of(num_envs: int, part: tuple[int, int]) -> int:
    """How many of N environments are in a part (r, P).

    Raises:
        UserError: the parts would not be equal.
    """
    parts = part[1]
    if num_envs % parts:
        raise UserError(
            f"num_envs {num_envs} cannot be divided into {parts} equal parts, one for each "
            f"process; use a multiple of {parts}, such as {num_envs + -num_envs % parts}"
        )
    return num_envs // parts


def _joined(parts: list[Any]) -> Any:
    """Tensors [n, ...] one after the other, in nests of dicts."""
    if isinstance(parts[0], dict):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(parts)


def _between(actions: Tensor, most: Tensor) -> bool:
    """Whether all actions [N, ...] are in 0..most; most is one number, or one per choice."""
    if most.dim():
        return not bool(((actions < 0) | (actions > most)).any())
    low, high = actions.aminmax()
    return low.item() >= 0 and high.item() <= most.item()


def options_of(space: spaces.Space) -> Any:
    """Options of each choice of an action: A, or an array of them."""
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec
    return space.n if isinstance(space, spaces.Discrete) else 2

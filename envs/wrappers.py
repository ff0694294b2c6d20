"""What stands between gymnasium's environments and ours: layouts of observations, and scales.

Observations become vectors, or images of any layout. They and the rewards can be brought to a scale
that networks like: gymnasium's wrappers give observations mean 0 and deviation 1 by coordinate, and
divide rewards by the deviation of their discounted sum (Engstrom et al. 2020, arXiv 2005.12729,
Section 3). All environments share one set of statistics, and both are clipped to -10..10, as in
CleanRL and Stable-Baselines3. Episodic returns stay those of the rewards as they were given.

Shapes: N environments, B observations, S stacked frames, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import (
    DtypeObservation,
    FlattenObservation,
    NormalizeObservation,
    TransformObservation,
)
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import ClipReward, NormalizeReward
from torch import Tensor

from dynmoe.errors import UserError

LIMIT = 10.0


@dataclass(frozen=True)
class Layout:
    """How stored observations become inputs [B, *input_shape]."""

    input_shape: tuple[int, ...]
    """(C, H, W), stacked frames being channels; or (D,)"""
    channels_last: bool = False
    """images are [H, W, C], not [C, H, W]"""
    bounds: tuple[float, float] | None = None
    """values that become 0 and 1; None: values stay as they are, such as bytes in 0..255"""

    def inputs(self, observations: Tensor) -> Tensor:
        """Stored observations [B, ...] as inputs [B, *input_shape].

        Vectors as float32; images uint8 in 0..255 or float32, with channels_last memory.
        """
        x = observations
        if len(self.input_shape) == 1:
            return x.flatten(1).float()
        if self.channels_last:
            x = x.movedim(-1, -3)
        x = x.reshape(len(x), *self.input_shape)
        if self.bounds is not None:
            low, high = self.bounds
            x = (x.float() - low) / (high - low)
        return x.contiguous(memory_format=torch.channels_last)


def layout_of(space: spaces.Box) -> Layout:
    """The layout of observations prepared by `as_array`.

    Of three axes the first is taken for channels where it is shorter than the last (compare
    Stable-Baselines3's `is_image_space_channels_first`); of four the first is a stack of frames.
    """
    shape = space.shape
    if not _is_image(space):
        return Layout((math.prod(shape),))
    frames, picture = shape[0] if len(shape) == 4 else 1, shape[-3:]
    if len(shape) == 2:
        picture = (1, *shape)
    channels_last = len(shape) > 2 and picture[0] >= picture[2]
    height, width, channels = picture if channels_last else (*picture[1:], picture[0])
    as_they_are = (0.0, 255.0) if space.dtype == np.uint8 else (0.0, 1.0)
    bounds = None if _bounds(space) == as_they_are else _bounds(space)
    return Layout((frames * channels, height, width), channels_last, bounds)


def as_array(env: gymnasium.Env) -> gymnasium.Env:
    """The environment with observations of bytes or float32: images as they are, else vectors.

    Dictionaries, tuples and numbers that count (one-hot) are flattened by gymnasium's wrapper; what
    a dictionary or tuple holds in bytes, such as an image, is brought to 0..1.

    Raises:
        UserError: it cannot make an array of them.
    """
    shown = space = env.observation_space
    if not isinstance(space, spaces.Box) or (len(space.shape) != 1 and not _is_image(space)):
        env = FlattenObservation(env)
        space = env.observation_space
    if not isinstance(space, spaces.Box):
        raise UserError(f"it shows {space}, which cannot be flattened to an array of numbers")
    if isinstance(shown, spaces.Dict | spaces.Tuple):
        low, span = (np.concatenate(ends) for ends in zip(*_scales(shown), strict=True))

        def scaled(seen: np.ndarray) -> np.ndarray:
            return (seen.astype(np.float32) - low) / span

        if (low != 0).any() or (span != 1).any():
            space = spaces.Box(scaled(space.low), scaled(space.high), dtype=np.float32)
            env = TransformObservation(env, scaled, space)
    if space.dtype not in (np.uint8, np.float32):
        env = DtypeObservation(env, np.float32)
    return env


def _scales(space: spaces.Space) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is subtracted from flattened observations, and what they are then divided by.

    Both [D] of each part: the bounds of bytes, else 0 and 1.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return [scale for part in parts for scale in _scales(part)]
    if isinstance(space, spaces.Box) and space.dtype == np.uint8:
        low, high = (end.astype(np.float32).ravel() for end in (space.low, space.high))
        return [(low, np.where(high > low, high - low, np.float32(1)))]
    size = spaces.flatdim(space)
    return [(np.zeros(size, np.float32), np.ones(size, np.float32))]


def _is_image(space: spaces.Box) -> bool:
    """Three axes; or two (gray) or four (a stack) whose values all have the same bounds."""
    axes = len(space.shape)
    return axes == 3 or (axes in (2, 4) and _bounds(space) is not None)


def _bounds(space: spaces.Box) -> tuple[float, float] | None:
    """The finite bounds that all values share, if they do."""
    low, high = float(space.low.min()), float(space.high.max())
    shared = bool((space.low == low).all() and (space.high == high).all())
    return (low, high) if shared and math.isfinite(high - low) and high > low else None


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
        wrapper = _Scaled(env)
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

    def raw(self) -> np.ndarray | None:
        """The latest observations [N, ...] before normalisation; None: they are as they are."""
        kept = [wrapper.raw for wrapper in self.wrappers if isinstance(wrapper, _Scaled)]
        return np.stack(kept) if kept else None

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


class _Scaled(NormalizeObservation):
    """Keeps the latest observation as it is before normalisation."""

    raw: np.ndarray

    def observation(self, observation: Any) -> Any:
        """An observation [...], normalised."""
        self.raw = np.array(observation)
        return super().observation(observation)


class _Given(VectorWrapper):
    """Keeps the latest rewards [N] as they are before normalisation."""

    rewards: np.ndarray

    def step(self, actions: Any) -> tuple[Any, ...]:
        """One step."""
        result = self.env.step(actions)
        self.rewards = np.array(result[1])
        return result

"""gymnasium's observations as what networks take: vectors, or images of any layout.

Shapes: B observations, S stacked frames, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.wrappers import DtypeObservation, FlattenObservation
from torch import Tensor

from dynmoe.errors import UserError


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
        """Vectors as float32; images uint8 in 0..255 or float32, with channels_last memory."""
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

    Dictionaries, tuples and numbers that count (one-hot) are flattened by gymnasium's wrapper.

    Raises:
        UserError: it cannot make an array of them.
    """
    space = env.observation_space
    if not isinstance(space, spaces.Box) or (len(space.shape) != 1 and not _is_image(space)):
        env = FlattenObservation(env)
        space = env.observation_space
    if not isinstance(space, spaces.Box):
        raise UserError(f"it shows {space}, which cannot be flattened to an array of numbers")
    if space.dtype not in (np.uint8, np.float32):
        env = DtypeObservation(env, np.float32)
    return env


def _is_image(space: spaces.Box) -> bool:
    """Three axes; or two (gray) or four (a stack) whose values all have the same bounds."""
    axes = len(space.shape)
    return axes == 3 or (axes in (2, 4) and _bounds(space) is not None)


def _bounds(space: spaces.Box) -> tuple[float, float] | None:
    """The finite bounds that all values share, if they do."""
    low, high = float(space.low.min()), float(space.high.max())
    shared = bool((space.low == low).all() and (space.high == high).all())
    return (low, high) if shared and math.isfinite(high - low) and high > low else None

"""The state of gymnasium's environments as plain values, where it is made of such.

Most environments in python are: numbers, arrays, containers of them and random generators, in the
environment, its wrappers and the vector around them. Where anything else is found, such as the
world of a physics engine, there is no state to be had.
"""

from __future__ import annotations

import types
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.utils import RunningMeanStd

FIXED = (
    EnvSpec, RunningMeanStd, type, np.dtype, partial,
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
"""What an environment is made with, and does not change; statistics are saved by their owner."""
NAMES = ("metadata", "_saved_kwargs", "_cached_spec", "env_fns", "spec", "env", "autoreset_mode",
         "_autoreset_mode")  # fmt: skip
"""Attributes of that kind whatever they hold; `env` is looked at by itself."""
PLAIN = (type(None), bool, int, float, str, bytes)


class NotPlainError(Exception):
    """An attribute cannot be copied; the message says which."""


def state_of(envs: VectorEnv) -> list[dict[str, Any]] | None:
    """What all environments and wrappers hold, for `restore`; None if some of it is not plain."""
    try:
        return [_attributes(layer) for layer in _layers(envs)]
    except NotPlainError:
        return None


def restore(envs: VectorEnv, state: list[dict[str, Any]]) -> None:
    """Bring environments that were made and reset alike to a `state_of`."""
    for layer, values in zip(_layers(envs), state, strict=True):
        for name, value in values.items():
            now = vars(layer).get(name)
            restored = _unpacked(value)
            if isinstance(now, spaces.Space):
                now._np_random = restored
            elif isinstance(now, np.ndarray) and _alike(now, restored):
                now[...] = restored  # others may look at this very array
            else:
                setattr(layer, name, restored)


def _alike(array: np.ndarray, other: Any) -> bool:
    """Whether one array can be written into the other without a loss."""
    return isinstance(other, np.ndarray) and (array.shape, array.dtype) == (
        other.shape,
        other.dtype,
    )


def _layers(envs: VectorEnv) -> list[Any]:
    """All objects from the outermost to the innermost."""
    found: list[Any] = []
    waiting: list[Any] = [envs]
    while waiting:
        layer = waiting.pop(0)
        found.append(layer)
        if isinstance(layer, SyncVectorEnv):
            waiting += layer.envs
        elif "env" in vars(layer):
            waiting.append(layer.env)
    return found


def _attributes(layer: Any) -> dict[str, Any]:
    """The attributes that may change, packed."""
    values = {name: value for name, value in vars(layer).items() if name not in NAMES}
    if isinstance(layer, SyncVectorEnv):
        values.pop("envs")
    if isinstance(layer, VectorWrapper):
        values.pop("wrapper", None)  # how it clips or scales
    return {n: _packed(v, n) for n, v in values.items() if not isinstance(v, FIXED)}


def _packed(value: Any, name: str) -> list[Any]:
    """A value as [kind, plain values and tensors].

    Raises:
        NotPlainError: it is none of the kinds.
    """
    if type(value) in PLAIN:
        return ["value", value]
    if isinstance(value, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return _packed(value._np_random, name)
    if isinstance(value, np.random.Generator):
        return ["generator", _packed(value.bit_generator.state, name)]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return [kind, torch.from_numpy(np.array(value))]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "SU":
        kind = "texts" if isinstance(value, np.ndarray) else "text"
        return [kind, [value.dtype.str, value.tolist()]]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return ["dict", {key: _packed(part, name) for key, part in value.items()}]
    if type(value) is deque:  # the frames of a stack
        return ["deque", [value.maxlen, _packed(list(value), name)]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_packed(part, name) for part in value]]
    raise NotPlainError(name)


def _unpacked(packed: list[Any]) -> Any:
    """The value again."""
    kind, held = packed
    if kind == "generator":
        generator = np.random.default_rng()
        generator.bit_generator.state = _unpacked(held)
        return generator
    if kind in ("array", "number"):
        array = held.numpy().copy()
        return array if kind == "array" else array[()]
    if kind in ("texts", "text"):
        array = np.array(held[1], held[0])
        return array if kind == "texts" else array[()]
    if kind == "dict":
        return {key: _unpacked(part) for key, part in held.items()}
    if kind == "deque":
        return deque(_unpacked(held[1]), held[0])
    if kind in ("list", "tuple"):
        parts = [_unpacked(part) for part in held]
        return parts if kind == "list" else tuple(parts)
    return held

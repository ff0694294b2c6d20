"""The state of gymnasium's environments as plain values, where it is made of such.

Most environments in python are: numbers, arrays, containers of them and random generators, in the
environment, its wrappers and the vector around them. So are MuJoCo's (`envs.mujoco_state`). Where
anything else is found, such as Box2D's world, there is no state to be had.
"""

from __future__ import annotations

import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.utils import RunningMeanStd

from dynmoe.errors import UserError
from envs.mujoco_state import is_simulation, restore_simulation, simulation_state

FIXED = (
    EnvSpec, type, np.dtype, partial,
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
"""What an environment is made with, and does not change."""
NAMES = ("metadata", "_saved_kwargs", "_cached_spec", "env_fns", "spec", "env", "autoreset_mode",
         "_autoreset_mode", "mujoco_renderer")  # fmt: skip
"""Attributes of that kind whatever they hold; `env` is looked at by itself."""
PLAIN = (type(None), bool, int, float, str, bytes)
DICTS = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}
FACTORIES = {made.__name__: made for made in (int, float, bool, str, list, dict)}
"""What a defaultdict may make, wherever it is."""


class NotPlainError(Exception):
    """An attribute cannot be copied; the message says which."""


def state_of(envs: VectorEnv, others: Iterable[Any] = ()) -> list[dict[str, Any]] | None:
    """What all environments and wrappers hold, for `restore`; None if some of it is not plain.

    But for `others`: objects that all environments share, and that their owner saves.
    """
    known = {id(other) for other in others}
    try:
        return [_attributes(layer, known) for layer in _layers(envs)]
    except NotPlainError:
        return None


def restore(envs: VectorEnv, state: list[dict[str, Any]]) -> None:
    """Bring environments that were made and reset alike to a `state_of`.

    Raises:
        UserError: a dictionary of the environment's own kind is not there before the first step.
    """
    for layer, values in zip(_layers(envs), state, strict=True):
        for name, value in values.items():
            now = vars(layer).get(name)
            restored = _unpacked(value)
            if value[0] == "simulation":
                restore_simulation(now, restored)
            elif isinstance(now, spaces.Space):
                _reseed(now, restored)
            elif isinstance(now, RunningMeanStd):
                vars(now).update(vars(restored))  # wrappers may share it
            elif value[0] == "own dict":
                if not isinstance(now, dict):
                    raise UserError(
                        f"the environment's {name} cannot be restored: make it in __init__ or reset"
                    )
                now.clear()
                now.update(restored)
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


def _attributes(layer: Any, others: set[int]) -> dict[str, Any]:
    """The attributes that may change, packed, but for objects with these ids."""
    values = {name: value for name, value in vars(layer).items() if name not in NAMES}
    if isinstance(layer, SyncVectorEnv):
        values.pop("envs")
    if isinstance(layer, VectorWrapper):
        values.pop("wrapper", None)  # how it clips or scales
    changing = {n: v for n, v in values.items() if not isinstance(v, FIXED)}
    return {n: _attribute(v, n) for n, v in changing.items() if id(v) not in others}


def _attribute(value: Any, name: str) -> list[Any]:
    """An attribute, packed: also kinds that are restored into what is there then.

    Raises:
        NotPlainError: it is none of the kinds.
    """
    if isinstance(value, spaces.Dict | spaces.Tuple):
        inner = [_attribute(part, name) for part in _parts(value)]
        return ["tuple", [_packed(value._np_random, name), *inner]]
    if isinstance(value, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return _packed(value._np_random, name)
    if is_simulation(value):
        return ["simulation", simulation_state(value)]
    try:
        return _packed(value, name)
    except NotPlainError:
        if not isinstance(value, dict) or type(value) is dict or getattr(value, "__dict__", None):
            raise
        return ["own dict", _packed(dict(value), name)[1]]


def _parts(space: spaces.Dict | spaces.Tuple) -> list[spaces.Space]:
    """The spaces that it holds."""
    return list(space.values() if isinstance(space, spaces.Dict) else space.spaces)


def _reseed(space: spaces.Space, generators: Any) -> None:
    """Give a space its generator, or its own and those of its parts."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        generators, *inner = generators
        for part, each in zip(_parts(space), inner, strict=True):
            _reseed(part, each)
    space._np_random = generators


def _packed(value: Any, name: str) -> list[Any]:
    """A value as [kind, plain values and tensors].

    Raises:
        NotPlainError: it is none of the kinds.
    """
    if type(value) in PLAIN:
        return ["value", value]
    if isinstance(value, np.random.Generator):
        return ["generator", _packed(value.bit_generator.state, name)]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return [kind, torch.from_numpy(np.array(value))]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "SU":
        kind = "texts" if isinstance(value, np.ndarray) else "text"
        return [kind, [value.dtype.str, value.tolist()]]
    if type(value) is RunningMeanStd:
        return ["statistics", {n: _packed(part, name) for n, part in vars(value).items()}]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        parts = {key: _packed(part, name) for key, part in value.items()}
        kind = type(value).__name__
        if DICTS.get(kind) is type(value):
            return [kind, parts]
        if type(value) is defaultdict:
            made = [n for n, factory in FACTORIES.items() if factory is value.default_factory]
            if made:
                return ["defaultdict", [made[0], parts]]
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
    if kind == "statistics":
        statistics = RunningMeanStd()
        vars(statistics).update({name: _unpacked(part) for name, part in held.items()})
        return statistics
    if kind == "defaultdict":
        return defaultdict(FACTORIES[held[0]], _unpacked(["dict", held[1]]))
    if kind in DICTS or kind == "own dict":
        return DICTS.get(kind, dict)({key: _unpacked(part) for key, part in held.items()})
    if kind == "deque":
        return deque(_unpacked(held[1]), held[0])
    if kind in ("list", "tuple"):
        parts = [_unpacked(part) for part in held]
        return parts if kind == "list" else tuple(parts)
    return held

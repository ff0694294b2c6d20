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


class _Seen:
    """Objects that may change, by number: one that stands in two places is packed once."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []  # so that no id is given again
        self._open: set[int] = set()

    def pack(self, value: Any, name: str) -> list[Any]:
        """An object and its number, or its number alone.

        Raises:
            NotPlainError: it is none of the kinds, or holds itself.
        """
        number = self._numbers.get(id(value))
        if number in self._open:
            raise NotPlainError(name)
        if number is not None:
            return ["same", number]
        number = self._numbers[id(value)] = len(self._held)
        self._held.append(value)
        self._open.add(number)
        try:
            return ["object", [number, _packed(value, name, self)]]
        except NotPlainError:
            self._numbers = {i: n for i, n in self._numbers.items() if n < number}
            raise
        finally:
            self._open.discard(number)


def state_of(envs: VectorEnv, others: Iterable[Any] = ()) -> list[dict[str, Any]] | None:
    """What all environments and wrappers hold, for `restore`; None if some of it is not plain.

    But for `others`: objects that all environments share, and that their owner saves.
    """
    known = {id(other) for other in others}
    try:
        seen = _Seen()
        return [_attributes(layer, known, seen) for layer in _layers(envs)]
    except NotPlainError:
        return None


def restore(envs: VectorEnv, state: list[dict[str, Any]]) -> None:
    """Bring environments that were made and reset alike to a `state_of`.

    Raises:
        UserError: a dictionary of the environment's own kind is not there before the first step.
    """
    made: dict[int, Any] = {}
    for layer, values in zip(_layers(envs), state, strict=True):
        for name, value in values.items():
            now = vars(layer).get(name)
            restored = _unpacked(value, made)
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


def _attributes(layer: Any, others: set[int], seen: _Seen) -> dict[str, Any]:
    """The attributes that may change, packed, but for objects with these ids."""
    values = {name: value for name, value in vars(layer).items() if name not in NAMES}
    if isinstance(layer, SyncVectorEnv):
        values.pop("envs")
    if isinstance(layer, VectorWrapper):
        values.pop("wrapper", None)  # how it clips or scales
    changing = {n: v for n, v in values.items() if not isinstance(v, FIXED)}
    return {n: _attribute(v, n, seen) for n, v in changing.items() if id(v) not in others}


def _attribute(value: Any, name: str, seen: _Seen) -> list[Any]:
    """An attribute, packed: also kinds that are restored into what is there then.

    Raises:
        NotPlainError: it is none of the kinds.
    """
    if isinstance(value, spaces.Dict | spaces.Tuple):
        inner = [_attribute(part, name, seen) for part in _parts(value)]
        return ["tuple", [_packed(value._np_random, name, seen), *inner]]
    if isinstance(value, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return _packed(value._np_random, name, seen)
    if is_simulation(value):
        return ["simulation", simulation_state(value)]
    if isinstance(value, np.ndarray):  # written to in its place
        return _packed(value, name, seen)
    try:
        return _inner(value, name, seen)
    except NotPlainError:
        if not isinstance(value, dict) or type(value) is dict or getattr(value, "__dict__", None):
            raise
        return ["own dict", _packed(dict(value), name, seen)[1]]


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


def _inner(value: Any, name: str, seen: _Seen) -> list[Any]:
    """As `_packed`, for what is restored as a new object."""
    if isinstance(value, list | dict | deque | np.ndarray | np.random.Generator):
        return seen.pack(value, name)
    return _packed(value, name, seen)


def _packed(value: Any, name: str, seen: _Seen) -> list[Any]:
    """A value as [kind, plain values and tensors].

    Raises:
        NotPlainError: it is none of the kinds.
    """
    if type(value) in PLAIN:
        return ["value", value]
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        if type(bits) is not getattr(np.random, type(bits).__name__, None):
            raise NotPlainError(name)
        return ["generator", _packed(bits.state, name, seen)]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return [kind, torch.from_numpy(np.array(value))]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "SU":
        kind = "texts" if isinstance(value, np.ndarray) else "text"
        return [kind, [value.dtype.str, value.tolist()]]
    if type(value) is RunningMeanStd:
        return ["statistics", {n: _packed(part, name, seen) for n, part in vars(value).items()}]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        parts = {key: _inner(part, name, seen) for key, part in value.items()}
        kind = type(value).__name__
        if DICTS.get(kind) is type(value):
            return [kind, parts]
        if type(value) is defaultdict:
            made = [n for n, factory in FACTORIES.items() if factory is value.default_factory]
            if made:
                return ["defaultdict", [made[0], parts]]
    if type(value) is deque:  # the frames of a stack
        return ["deque", [value.maxlen, _packed(list(value), name, seen)]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_inner(part, name, seen) for part in value]]
    raise NotPlainError(name)


def _unpacked(packed: list[Any], made: dict[int, Any]) -> Any:
    """The value again; `made` holds the objects that have been made, by number."""
    kind, held = packed
    if kind == "same":
        return made[held]
    if kind == "object":
        made[held[0]] = _unpacked(held[1], made)
        return made[held[0]]
    if kind == "generator":
        state = _unpacked(held, made)
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    if kind in ("array", "number"):
        array = held.numpy().copy()
        return array if kind == "array" else array[()]
    if kind in ("texts", "text"):
        array = np.array(held[1], held[0])
        return array if kind == "texts" else array[()]
    if kind == "statistics":
        statistics = RunningMeanStd()
        vars(statistics).update({name: _unpacked(part, made) for name, part in held.items()})
        return statistics
    if kind == "defaultdict":
        return defaultdict(FACTORIES[held[0]], _unpacked(["dict", held[1]], made))
    if kind in DICTS or kind == "own dict":
        return DICTS.get(kind, dict)({key: _unpacked(part, made) for key, part in held.items()})
    if kind == "deque":
        return deque(_unpacked(held[1], made), held[0])
    if kind in ("list", "tuple"):
        parts = [_unpacked(part, made) for part in held]
        return parts if kind == "list" else tuple(parts)
    return held

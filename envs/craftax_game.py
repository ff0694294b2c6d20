"""Craftax's rules as programs over N environments, compiled by JAX for one device.

The rules are the craftax package's own functions; here they are only batched. Making a world takes
as long as 30 to 60 steps, so a step makes none: worlds are made by the block and put in place when
an episode ends.

Randomness is counted, not carried: environment i's step t draws from (key, t, i) and its k-th world
from (key, k, i), so neither depends on what the other environments do. The N environments at hand
may be a part of all: then i counts from the number of the first.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dynmoe.errors import UserError
from envs import jax_setup
from envs.jax_setup import Program

Array = Any
Tree = Any
"""upstream's EnvState; JAX has no types that mypy could check"""
State = dict[str, Array]
"""the same by the names of its fields, such as "inventory.wood", with N environments: [N, ...]"""
Carry = dict[str, Any]
"""What changes from step to step: "state", a State; "step" [] uint32, steps made since the start;
"returns" [N] float32 and "deepest" [N] int32, return and deepest floor of the running episodes"""

BLOCK = 16
"""worlds made at a time: on a CPU each then costs a third of one made alone"""
SOURCES = ["envs.craftax_game"]
"""modules that decide the programs"""


class Game(NamedTuple):
    """One of the two games, in upstream's functions of a single environment."""

    step: Callable[[Array, Tree, Array], tuple[Tree, Array]]
    """(key, state, action) -> state, reward"""
    make: Callable[[Array], Tree]
    """key -> the state that an episode starts in"""
    is_over: Callable[[Tree, Array], Array]
    """(state, most steps of an episode) -> whether the episode is over"""
    floor: Callable[[Tree], Array]
    """state -> the floor that the player is on"""
    facts: Facts


class Facts(NamedTuple):
    """What is fixed for a game."""

    achievements: list[str]
    num_actions: int
    num_floors: int
    max_return: float
    max_timesteps: int


class Programs(NamedTuple):
    """Compiled for N environments, with k worlds made at a time.

    Both take their first argument's memory; all that they return is new.
    """

    step: Callable[..., tuple[Carry, dict[str, Array]]]
    """(carry, N worlds, rows [N] int32, count [] int32, actions [N] int32, key [2] uint32, most
    steps of an episode [] int32, number of the first environment [] int32): the first `count` of
    `rows` begin in their worlds, then all step -> carry, a dict of

    floats        [2, N] float32, reward and return
    flags         [3, N] bool, terminated, truncated, either
    counts        [3, N] int32, length, deepest floor and the floor that the next step begins on
    achievements  [N, A] bool
    """
    make: Callable[..., State]
    """(N worlds, key [2] uint32, rows [k] int32, episodes [k] int32, count [] int32, number of the
    first environment [] int32) -> N worlds; those of the first `count` of `rows` are made, for
    these environments' given episodes"""
    carry: Carry
    """shapes and types of a carry, as jax.ShapeDtypeStruct"""
    k: int
    facts: Facts


@functools.cache
def programs(classic: bool, num_envs: int, kind: str, index: int | None = None) -> Programs:
    """A game's programs on a JAX device, "cpu" or "cuda" and its number; made once per process.

    Raises:
        UserError: jax or craftax is not installed, or JAX lacks the device.
    """
    k = min(BLOCK, num_envs)
    loaded = jax_setup.load(
        f"{_title(classic)} for {num_envs} environments",
        SOURCES,
        jax_setup.device(kind, index),
        lambda: _build(classic, num_envs, k),
    )
    return Programs(**loaded.run, carry=loaded.takes["step"][0], k=k, facts=Facts(**loaded.facts))


@functools.cache
def view(
    classic: bool, num_envs: int, what: str, kind: str, index: int | None = None
) -> tuple[Callable[[State], Array], tuple[int, ...]]:
    """What is seen of N states, as a program on a JAX device, and its shape for one environment.

    Args:
        classic, num_envs, kind, index: as for `programs`.
        what: "codes", uint8 [size], see envs.craftax_code; "symbolic", upstream's float32 vector;
            or upstream's own frames, "pixels", uint8 [H, W, 3], or "pixels-float", in 0..1.
    """
    loaded = jax_setup.load(
        f"{_title(classic)} {what} of {num_envs} environments",
        [*SOURCES, "envs.craftax_code"],
        jax_setup.device(kind, index),
        lambda: ({"see": _build_view(classic, num_envs, what)}, {}),
    )
    return loaded.run["see"], loaded.gives["see"].shape[1:]


def _title(classic: bool) -> str:
    return "Craftax-Classic" if classic else "Craftax"


@functools.cache
def game(classic: bool) -> Game:
    """Craftax-Classic or Craftax.

    Raises:
        UserError: craftax is not installed.
    """
    jax_setup.prepare()
    try:
        return _classic() if classic else _full()
    except ImportError as error:
        raise UserError(f"Craftax cannot be loaded ({error}); run: pip install craftax") from None


def _full() -> Game:
    from craftax.craftax.constants import ACHIEVEMENT_REWARD_MAP, Achievement, Action
    from craftax.craftax.craftax_state import EnvParams, StaticEnvParams
    from craftax.craftax.game_logic import craftax_step, is_game_over
    from craftax.craftax.world_gen.world_gen import generate_world

    params, static = EnvParams(), StaticEnvParams()
    return Game(
        step=lambda key, state, action: craftax_step(key, state, action, params, static),
        make=lambda key: generate_world(key, params, static),
        is_over=lambda state, most: is_game_over(state, EnvParams(max_timesteps=most), static),
        floor=lambda state: state.player_level,
        facts=Facts(
            achievements=_names(Achievement),
            num_actions=len(Action),
            num_floors=static.num_levels,
            max_return=float(ACHIEVEMENT_REWARD_MAP.sum()),
            max_timesteps=params.max_timesteps,
        ),
    )


def _classic() -> Game:
    from craftax.craftax_classic.constants import Achievement, Action
    from craftax.craftax_classic.envs.craftax_state import EnvParams, StaticEnvParams
    from craftax.craftax_classic.game_logic import craftax_step, is_game_over
    from craftax.craftax_classic.world_gen import generate_world

    params, static = EnvParams(), StaticEnvParams()
    return Game(
        step=lambda key, state, action: craftax_step(key, state, action, params, static),
        make=lambda key: generate_world(key, params, static),
        is_over=lambda state, most: is_game_over(state, EnvParams(max_timesteps=most)),
        floor=lambda state: np.int32(0),
        facts=Facts(
            achievements=_names(Achievement),
            num_actions=len(Action),
            num_floors=1,
            max_return=float(len(Achievement)),  # each pays 1
            max_timesteps=params.max_timesteps,
        ),
    )


def _names(achievements: Any) -> list[str]:
    """In the order of the state's flags."""
    return [each.name.lower() for each in sorted(achievements, key=lambda each: each.value)]


def _build(classic: bool, n: int, k: int) -> tuple[dict[str, Program], dict[str, Any]]:
    """All programs but the views, and the facts."""
    one, key = _spec((), np.int32), _spec((2,), np.uint32)
    block, every = _spec((k,), np.int32), _spec((n,), np.int32)
    worlds = _states(classic, n)
    carry = {
        "state": worlds,
        "step": _spec((), np.uint32),
        "returns": _spec((n,), np.float32),
        "deepest": every,
    }
    step, make = (functools.partial(f, classic) for f in (_step, _make))
    return {
        "step": Program(step, (carry, worlds, every, one, every, key, one, one), donate=True),
        "make": Program(make, (worlds, key, block, block, one, one), donate=True),
    }, game(classic).facts._asdict()


def _build_view(classic: bool, n: int, what: str) -> Program:
    import jax
    import jax.numpy as jnp

    package = f"craftax.craftax{'_classic' * classic}"
    game(classic)  # says so where craftax is missing
    if what == "codes":
        from envs.craftax_code import encoder

        see = encoder(classic)
    elif what == "symbolic":
        see = importlib.import_module(f"{package}.renderer").render_craftax_symbolic
    else:
        frame, whole = _upstream_frames(package), what == "pixels"

        def see(state: Tree) -> Array:
            return jnp.round(frame(state)).astype(jnp.uint8) if whole else frame(state) / 255.0

    return Program(lambda states: jax.vmap(see)(tree(classic, states)), (_states(classic, n),))


def _upstream_frames(package: str) -> Callable[[Tree], Array]:
    """Upstream's renderer, state -> [H, W, 3] in 0..255, with textures of the one size it needs.

    Its own loader makes three sizes, which takes a minute, and writes them into the installed
    package.
    """
    constants: Any = importlib.import_module(f"{package}.constants")
    renderer: Any = importlib.import_module(f"{package}.renderer")
    tile, load = constants.BLOCK_PIXEL_SIZE_AGENT, renderer.load_all_textures
    renderer.load_all_textures = lambda: {tile: constants.load_all_textures_given_size(tile)}
    try:
        return renderer.make_craftax_pixel_renderer(tile)
    finally:
        renderer.load_all_textures = load


def _make(
    classic: bool,
    worlds: State,
    key: Array,
    rows: Array,
    episodes: Array,
    count: Array,
    number: Array,
) -> State:
    import jax

    fold, make = jax.random.fold_in, game(classic).make
    numbers = number + rows
    new = jax.vmap(lambda i, episode: make(fold(fold(key, episode), i)))(numbers, episodes)
    return _copy(worlds, by_name(new), jax.numpy.arange(len(rows)), rows, count)


def _step(
    classic: bool,
    carry: Carry,
    worlds: State,
    rows: Array,
    count: Array,
    actions: Array,
    key: Array,
    most: Array,
    number: Array,
) -> tuple[Carry, dict[str, Array]]:
    import jax
    import jax.numpy as jnp

    carry = _start(carry, worlds, rows, count)
    rules, now = game(classic), jax.random.fold_in(key, carry["step"])
    keys = jax.vmap(lambda i: jax.random.fold_in(now, i))(number + jnp.arange(len(actions)))
    state, reward = jax.vmap(rules.step)(keys, tree(classic, carry["state"]), actions)
    over = jax.vmap(rules.is_over, in_axes=(0, None))
    # upstream ends an episode for its length as for a death; at time 0 only the death is left
    terminated = over(state.replace(timestep=jnp.zeros_like(state.timestep)), most)
    done = over(state, most)
    floor = jax.vmap(rules.floor)(state)
    returns, deepest = carry["returns"] + reward, jnp.maximum(carry["deepest"], floor)
    carry = {
        "state": by_name(state),
        "step": carry["step"] + 1,
        "returns": returns,
        "deepest": deepest,
    }
    return carry, {
        "floats": jnp.stack([reward, returns]),
        "flags": jnp.stack([terminated, done & ~terminated, done]),
        "counts": jnp.stack([state.timestep, deepest, jnp.where(done, 0, floor)]),
        "achievements": state.achievements,
    }


def _start(carry: Carry, worlds: State, rows: Array, count: Array) -> Carry:
    fresh = {name: np.zeros(rows.shape, carry[name].dtype) for name in ("returns", "deepest")}
    old = {**carry["state"], **{name: carry[name] for name in fresh}}
    new = _copy(old, {**worlds, **fresh}, rows, rows, count)
    return {name: new.pop(name) for name in fresh} | {"step": carry["step"], "state": new}


def _copy(into: State, source: State, old: Array, new: Array, count: Array) -> State:
    """Copy the source's rows old[j] to rows new[j], for j < count, in place."""
    from jax import lax

    def copy(j: Array, into: State) -> State:
        rows = {name: lax.dynamic_slice_in_dim(x, old[j], 1) for name, x in source.items()}
        return {
            name: lax.dynamic_update_slice_in_dim(x, rows[name], new[j], 0)
            for name, x in into.items()
        }

    return lax.fori_loop(0, count, copy, into)


@functools.cache
def _world(classic: bool) -> Tree:
    """Shapes and types of one world."""
    import jax

    return jax.eval_shape(game(classic).make, _spec((2,), np.uint32))


def _states(classic: bool, n: int) -> State:
    """Shapes and types of n worlds."""
    return {name: _spec((n, *x.shape), x.dtype) for name, x in by_name(_world(classic)).items()}


def shapes(num_envs: int) -> tuple[State, Any]:
    """What programs over N worlds of Craftax take: the worlds, and one int32."""
    return _states(False, num_envs), _spec((), np.int32)


def _spec(shape: tuple[int, ...], dtype: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def by_name(tree: Tree) -> State:
    """Upstream's states by the names of their fields."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def tree(classic: bool, state: State) -> Tree:
    """Upstream's states, of their fields by name."""
    import jax

    world = _world(classic)
    return jax.tree.unflatten(jax.tree.structure(world), [state[name] for name in by_name(world)])

"""States of upstream Craftax, played at random and edited by hand, and upstream's frames of them.

States are upstream's EnvState with numpy arrays of a leading axis [N].
"""

from __future__ import annotations

import functools
import importlib
from typing import Any
from unittest import mock

import numpy as np
import torch

from envs.craftax_code import encoder

CHUNK = 64
"""states per call of a jitted function, so that it is compiled once"""


@functools.cache
def parts(classic: bool) -> dict[str, Any]:
    """Upstream's modules of one game, and its parameters."""
    if classic:
        names = ("constants", "renderer", "game_logic", "world_gen", "envs.craftax_state")
        modules = [importlib.import_module(f"craftax.craftax_classic.{name}") for name in names]
    else:
        names = ("constants", "renderer", "game_logic", "world_gen.world_gen", "craftax_state")
        modules = [importlib.import_module(f"craftax.craftax.{name}") for name in names]
    keys = ("constants", "renderer", "logic", "worlds", "state")
    return dict(zip(keys, modules, strict=True))


@functools.cache
def game(classic: bool) -> tuple[Any, Any]:
    """Upstream's (make worlds from keys, step with keys, states and actions), vmapped, jitted."""
    import jax

    upstream = parts(classic)
    settings = upstream["state"].EnvParams()
    static = upstream["state"].StaticEnvParams()

    def make(key: Any) -> Any:
        return upstream["worlds"].generate_world(key, settings, static)

    def step(key: Any, state: Any, action: Any) -> Any:
        return upstream["logic"].craftax_step(key, state, action, settings, static)[0]

    quick = {"xla_backend_optimization_level": 0}  # compiling is most of the time here
    first, second = (jax.jit(jax.vmap(run), compiler_options=quick) for run in (make, step))
    return first, second


@functools.cache
def drawer(classic: bool) -> Any:
    """Upstream's renderer, vmapped and jitted: states -> float32 [N, H, W, 3] in 0..1."""
    import jax

    upstream = parts(classic)
    size = upstream["constants"].BLOCK_PIXEL_SIZE_AGENT
    textures = {size: upstream["constants"].load_all_textures_given_size(size)}
    load = mock.Mock(return_value=textures)  # upstream's own would write into the package's folder
    with mock.patch.object(upstream["renderer"], "load_all_textures", load):
        draw = upstream["renderer"].make_craftax_pixel_renderer(size)
    return jax.jit(jax.vmap(lambda state: draw(state) / 255.0))


@functools.cache
def coder(classic: bool) -> Any:
    """Our encoder, vmapped and jitted: states -> codes [N, code_size]."""
    import jax

    return jax.jit(jax.vmap(encoder(classic)))


def in_chunks(function: Any, states: Any) -> np.ndarray:
    """A jitted function's array for states whose number is a multiple of CHUNK."""
    count = len(states.light_level)
    assert count % CHUNK == 0
    parts = [function(take(states, slice(i, i + CHUNK))) for i in range(0, count, CHUNK)]
    return np.concatenate([np.asarray(part) for part in parts])


@functools.cache
def sample(classic: bool) -> tuple[torch.Tensor, np.ndarray]:
    """Codes [N, code_size] and upstream's frames [N, H, W, 3] of many different states."""
    mixed = played(classic, floors=1 if classic else 9)
    states = [
        played(classic, steps=20),
        mixed,
        edited(classic, mixed, 0),
        edited(classic, mixed, 1),
    ]
    codes = np.concatenate([in_chunks(coder(classic), some) for some in states])
    frames = np.concatenate([in_chunks(drawer(classic), some) for some in states])
    return torch.from_numpy(codes), frames


def take(states: Any, index: Any) -> Any:
    """Some of the states."""
    import jax

    return jax.tree_util.tree_map(lambda leaf: leaf[index], states)


def join(several: list[Any]) -> Any:
    """States one after another."""
    import jax

    return jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves), *several)


def to_numpy(states: Any) -> Any:
    """The same states with writable numpy arrays."""
    import jax

    return jax.tree_util.tree_map(np.array, states)


def played(classic: bool, count: int = 32, steps: int = 40, every: int = 5, floors: int = 1) -> Any:
    """States of `count` random games after every `every` steps: [count * steps / every].

    The games start at all times of the day and, with floors > 1, on all floors in turn.
    """
    import jax

    make, step = game(classic)
    states = to_numpy(make(jax.random.split(jax.random.PRNGKey(3), count)))
    states = states.replace(timestep=(np.arange(count) * 300 // count).astype(np.int32))
    if floors > 1:
        level = (np.arange(count) % floors).astype(np.int32)
        here = states.up_ladders[np.arange(count), level]
        position = np.where(level[:, None] > 0, here, states.player_position).astype(np.int32)
        states = states.replace(player_level=level, player_position=position)
    rng = np.random.default_rng(3)
    actions = len(parts(classic)["constants"].Action)
    seen = []
    for i in range(steps):
        keys = jax.random.split(jax.random.PRNGKey(100 + i), count)
        states = step(keys, states, rng.integers(actions, size=count).astype(np.int32))
        if (i + 1) % every == 0:
            seen.append(to_numpy(states))
    return join(seen)


def edited(classic: bool, states: Any, seed: int) -> Any:
    """Copies of states with all that a frame shows replaced, by chance or in turn."""
    rng = np.random.default_rng(seed)
    count = len(states.light_level)
    states = to_numpy(states)
    size = states.map.shape[-1]
    states.player_position[:] = rng.choice([0, 1, 3, 20, 40, size - 2, size - 1], (count, 2))
    states.player_direction[:] = rng.integers(1, 5, count)
    states.is_sleeping[:] = rng.random(count) < 0.25
    times = [0.0, 0.1, 0.3, np.nextafter(np.float32(0.5), np.float32(0)), 0.5, 0.7, 1.0]
    some = rng.random(count) < 0.7
    states.light_level[:] = np.where(some, rng.choice(times, count), rng.random(count))
    states.state_rng[:] = rng.integers(0, 2**32, states.state_rng.shape)
    edit = _edit_classic if classic else _edit_full
    edit(states, rng, np.arange(count) + seed * count)
    return states


def _edit_classic(states: Any, rng: np.random.Generator, turn: np.ndarray) -> None:
    random = rng.random(len(turn)) < 0.5
    states.map[random] = rng.integers(0, 17, states.map[random].shape)
    for mob in (states.zombies, states.cows, states.skeletons, states.arrows):
        _scatter(mob, states.player_position[:, None], rng)
    states.arrow_directions[:] = rng.integers(-1, 2, states.arrow_directions.shape)
    for i, name in enumerate(states.inventory.__dataclass_fields__):
        getattr(states.inventory, name)[:] = (turn + 3 * i) % 10
    for i, name in enumerate(("health", "food", "drink", "energy")):
        getattr(states, f"player_{name}")[:] = (turn + 3 * i) % 10


def _edit_full(states: Any, rng: np.random.Generator, turn: np.ndarray) -> None:
    level, row = turn % 9, np.arange(len(turn))
    random = rng.random(len(turn)) < 0.5
    states.player_level[:] = level
    states.map[random, level[random]] = rng.integers(0, 37, (random.sum(), 48, 48))
    states.item_map[random, level[random]] = rng.integers(0, 5, (random.sum(), 48, 48))
    light = states.light_map[row, level]
    some = rng.random(light.shape) < 0.3
    states.light_map[row, level] = np.where(some, rng.random(light.shape), light)
    for mob in (states.melee_mobs, states.passive_mobs, states.ranged_mobs):
        _scatter(mob, states.player_position[:, None, None], rng)
    for name in ("mob_projectile", "player_projectile"):
        _scatter(getattr(states, f"{name}s"), states.player_position[:, None, None], rng)
        directions = getattr(states, f"{name}_directions")
        directions[:] = rng.integers(-1, 2, directions.shape)
    states.passive_mobs.type_id[:] %= 3
    alone = turn % 3 == 0  # then the boss may be vulnerable
    states.melee_mobs.mask[alone] = False
    states.ranged_mobs.mask[alone] = False
    states.boss_timesteps_to_spawn_this_round[:] = rng.integers(-2, 3, len(turn))
    states.monsters_killed[:] = rng.integers(5, 11, states.monsters_killed.shape)
    _edit_full_hud(states, rng, turn)


def _edit_full_hud(states: Any, rng: np.random.Generator, turn: np.ndarray) -> None:
    bag = states.inventory
    counted = ("wood", "stone", "coal", "iron", "diamond", "sapphire", "ruby", "sapling")
    for i, name in enumerate((*counted, "torches", "books", "arrows")):
        getattr(bag, name)[:] = (turn + 13 * i) % 100
    for i in range(6):
        bag.potions[:, i] = (turn + 7 * i) % 100
        bag.armour[:, i % 4] = (turn + i % 4) % 3
        states.armour_enchantments[:, i % 4] = (turn // 3 + i) % 3
    bag.pickaxe[:], bag.sword[:], bag.bow[:] = turn % 5, turn % 5, turn % 2
    states.sword_enchantment[:] = turn // 5 % 3
    states.bow_enchantment[:] = turn % 3
    states.learned_spells[:] = rng.random((len(turn), 2)) < 0.5
    states.player_health[:] = turn % 100 + rng.choice([-1.0, -0.5, 0.0, 0.9], len(turn))
    for i, name in enumerate(("food", "drink", "energy", "mana")):
        getattr(states, f"player_{name}")[:] = (turn + 5 * i) % 100
    for i, name in enumerate(("xp", "dexterity", "strength", "intelligence")):
        getattr(states, f"player_{name}")[:] = (turn + 2 * i) % 12


def _scatter(mob: Any, player: np.ndarray, rng: np.random.Generator) -> None:
    """Put mobs or projectiles of all types around where the player was, some on one spot."""
    far = rng.integers(-7, 8, mob.position.shape)
    near = rng.integers(-1, 2, mob.position.shape)
    mob.position[:] = player + np.where(rng.random((*far.shape[:-1], 1)) < 0.4, near, far)
    mob.mask[:] = rng.random(mob.mask.shape) < 0.8
    if hasattr(mob, "type_id"):
        mob.type_id[:] = rng.integers(0, 8, mob.type_id.shape)

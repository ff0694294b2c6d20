"""A Craftax state reduced to the bytes that its frame depends on.

The code of a frame is a row of uint8: float32 and uint32 fields first, kept as raw bytes, so that
`codes.view(torch.float32)` reads them in place; rows are a multiple of 4 bytes. `FULL` and
`CLASSIC` give the fields with their bytes, in order:

    light       float32 per map tile, 0 outside the map (Craftax only)
    daylight    float32, 1 on every floor but the first
    key         two uint32, the key of the night's noise
    tiles       per map tile, 5 * block + item (Craftax) or the block (Classic)
    sprites     the player's sprite, then one per mob and projectile in drawing order
    cells       where those stand: row * columns + column of the view, or NOT_VISIBLE
    hud         what each slot of the inventory shows, see HUD_* for the order
    asleep      0 or 1
    padding     up to a multiple of 4

Sprites are numbered player (left, right, up, down, asleep), then as `envs.craftax_textures` lists
them; a projectile's number is FIRST_PROJECTILE + 4 * type + flipped + 2 * transposed.

Source: the pixel renderers of craftax 1.6.1, which draw exactly this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.errors import UserError

NOT_VISIBLE = 255
MELEE, PASSIVE, RANGED, FIRST_PROJECTILE = 5, 13, 16, 24
"""first sprites of Craftax's kinds of mobs; the player has 0..4"""
ZOMBIE, COW, SKELETON, FIRST_ARROW = 5, 6, 7, 8
"""the same in Classic, where each mob has one sprite and an arrow four"""

HUD_COUNTS = (
    *("player_health", "player_food", "player_drink", "player_energy", "player_mana"),
    *("coal", "iron", "diamond", "sapphire", "ruby", "sapling"),
    *("wood", "stone", "torches", "books"),
)
"""first slots of Craftax's hud, a count 0..99 each; then come 6 potions and the arrows"""
HUD_DIGITS = (
    *("player_level", "player_xp", "player_dexterity", "player_strength", "player_intelligence"),
)
"""after the arrows, 0..9 each; then fireball and iceball known, bow, pickaxe, sword
(3 * tool + enchantment), 4 armour pieces (3 * armour + enchantment), the arrows' enchantment"""
HUD_CLASSIC = (
    *("player_health", "player_food", "player_drink", "player_energy"),
    *("sapling", "wood", "stone", "coal", "iron", "diamond"),
    *("wood_pickaxe", "stone_pickaxe", "iron_pickaxe", "wood_sword", "stone_sword", "iron_sword"),
)
"""all slots of Classic's hud, 0..9 each"""


@dataclass(frozen=True)
class Layout:
    """Where things stand in a code, and the shape of its frame.

    Attributes:
        fields: name of each field -> its bytes, in order.
        rows, columns: tiles of the map view.
        hud_rows, hud_columns: cells of the inventory below it.
        tile: pixels of a tile's or cell's side.
    """

    fields: dict[str, int]
    rows: int
    columns: int
    hud_rows: int
    hud_columns: int
    tile: int

    def part(self, name: str) -> slice:
        """The bytes of a field."""
        names = list(self.fields)
        start = sum(self.fields[before] for before in names[: names.index(name)])
        return slice(start, start + self.fields[name])

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return sum(self.fields.values())

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) in pixels."""
        return ((self.rows + self.hud_rows) * self.tile, self.columns * self.tile, 3)


FULL = Layout(
    {
        "light": 4 * 99,
        "daylight": 4,
        "key": 8,
        "tiles": 99,
        "sprites": 15,
        "cells": 14,
        "hud": 37,
        "asleep": 1,
        "padding": 2,
    },
    rows=9,
    columns=11,
    hud_rows=4,
    hud_columns=11,
    tile=10,
)
CLASSIC = Layout(
    {
        "daylight": 4,
        "key": 8,
        "tiles": 63,
        "sprites": 12,
        "cells": 11,
        "hud": 16,
        "asleep": 1,
        "padding": 1,
    },
    rows=7,
    columns=9,
    hud_rows=2,
    hud_columns=9,
    tile=7,
)


def layout(classic: bool) -> Layout:
    """The layout of a game's codes."""
    return CLASSIC if classic else FULL


def code_size(classic: bool) -> int:
    """Bytes of a frame's code."""
    return layout(classic).size


def fields(codes: Tensor, where: Layout) -> dict[str, Tensor]:
    """Views of the fields of codes [B, size], uint8 and contiguous: each [B, n], by name.

    `light` and `daylight` are float32, `key` is int32 (torch lacks arithmetic on uint32).
    """
    types = {"light": torch.float32, "daylight": torch.float32, "key": torch.int32}
    found = {}
    for name in where.fields:
        part, dtype = where.part(name), types.get(name, torch.uint8)
        width = dtype.itemsize
        found[name] = codes.view(dtype)[:, part.start // width : part.stop // width]
    return found


def encoder(classic: bool) -> Callable[[Any], Any]:
    """A JAX function from one upstream EnvState to its frame's code, uint8 [code_size].

    To be vmapped and jitted by the caller.

    Raises:
        UserError: JAX draws random numbers in another way than the renderer repeats.
    """
    _check_random_numbers()
    return _encode_classic if classic else _encode_full


def _check_random_numbers() -> None:
    """The night's noise is drawn by JAX's threefry; the renderer repeats its present form only."""
    import jax

    wanted = {"jax_threefry_partitionable": True, "jax_default_prng_impl": "threefry2x32"}
    for name, value in wanted.items():
        if getattr(jax.config, name) != value:
            raise UserError(
                f"JAX's setting {name} is {getattr(jax.config, name)!r}, but Craftax's renderer "
                f"needs {value!r}, JAX's default; unset the variable {name.upper()}"
            )


def _encode_full(state: Any) -> Any:
    import jax
    import jax.numpy as jnp
    from craftax.craftax.constants import BlockType, ItemType
    from craftax.craftax.util.game_logic_utils import is_boss_vulnerable

    level = state.player_level
    blocks = _window(state.map, state, FULL, BlockType.OUT_OF_BOUNDS.value)
    boss = jnp.where(
        is_boss_vulnerable(state),
        BlockType.NECROMANCER_VULNERABLE.value,
        BlockType.NECROMANCER.value,
    )
    blocks = jnp.where(blocks == BlockType.NECROMANCER.value, boss, blocks)
    items = _window(state.item_map, state, FULL, ItemType.NONE.value)
    closed = (items == ItemType.LADDER_DOWN.value) & (state.monsters_killed[level] < 8)
    items = jnp.where(closed, ItemType.LADDER_DOWN_BLOCKED.value, items)
    sprites, cells = _full_mobs(state)
    return _pack(
        FULL,
        light=_window(state.light_map, state, FULL, 0.0),
        daylight=jnp.where(level == 0, state.light_level, 1.0),
        key=jax.random.key_data(state.state_rng),
        tiles=blocks * 5 + items,
        sprites=jnp.concatenate([_player(state), sprites]),
        cells=cells,
        hud=_full_hud(state),
        asleep=state.is_sleeping,
    )


def _encode_classic(state: Any) -> Any:
    import jax
    import jax.numpy as jnp
    from craftax.craftax_classic.constants import BlockType

    mobs = [state.zombies, state.cows, state.skeletons, state.arrows]
    counts = [mob.mask.shape[0] for mob in mobs]
    fixed = [ZOMBIE] * counts[0] + [COW] * counts[1] + [SKELETON] * counts[2]
    sprites = [_player(state), jnp.array(fixed), FIRST_ARROW + _turn(state.arrow_directions)]
    counted = [getattr(state, name) for name in HUD_CLASSIC[:4]]
    counted += [getattr(state.inventory, name) for name in HUD_CLASSIC[4:]]
    return _pack(
        CLASSIC,
        daylight=state.light_level,
        key=jax.random.key_data(state.state_rng),
        tiles=_window(state.map, state, CLASSIC, BlockType.OUT_OF_BOUNDS.value),
        sprites=jnp.concatenate(sprites),
        cells=_cells(
            jnp.concatenate([mob.position for mob in mobs]),
            jnp.concatenate([mob.mask for mob in mobs]),
            state,
            CLASSIC,
        ),
        hud=jnp.clip(jnp.stack([jnp.asarray(count) for count in counted]), 0, 9),
        asleep=state.is_sleeping,
    )


def _full_mobs(state: Any) -> tuple[Any, Any]:
    """Sprites and cells [14] of all mobs and projectiles, in drawing order."""
    import jax.numpy as jnp

    level = state.player_level
    mobs = [state.melee_mobs, state.passive_mobs, state.ranged_mobs]
    shots = [state.mob_projectiles, state.player_projectiles]
    turns = [state.mob_projectile_directions, state.player_projectile_directions]
    kinds = zip(mobs, (MELEE, PASSIVE, RANGED), (8, 3, 8), strict=True)
    sprites = [first + jnp.clip(mob.type_id[level], 0, n - 1) for mob, first, n in kinds]
    sprites += [
        FIRST_PROJECTILE + 4 * jnp.clip(shot.type_id[level], 0, 7) + _turn(turn[level])
        for shot, turn in zip(shots, turns, strict=True)
    ]
    positions = jnp.concatenate([mob.position[level] for mob in mobs + shots])
    alive = jnp.concatenate([mob.mask[level] for mob in mobs + shots])
    return jnp.concatenate(sprites), _cells(positions, alive, state, FULL)


def _full_hud(state: Any) -> Any:
    import jax.numpy as jnp

    bag = state.inventory
    health = jnp.maximum(jnp.floor(state.player_health), 1).astype(jnp.int32)
    values = [health] + [
        getattr(state if name.startswith("player") else bag, name) for name in HUD_COUNTS[1:]
    ]
    counts = jnp.concatenate([jnp.stack(values), bag.potions, jnp.stack([bag.arrows])])
    digits = jnp.stack([getattr(state, name) for name in HUD_DIGITS])
    tools = jnp.stack([bag.bow, bag.pickaxe, 3 * bag.sword + state.sword_enchantment])
    parts = [
        jnp.clip(counts, 0, 99),
        jnp.clip(digits, 0, 9),
        state.learned_spells,
        tools,
        3 * bag.armour + state.armour_enchantments,
        jnp.stack([state.bow_enchantment]),
    ]
    return jnp.concatenate([part.astype(jnp.uint8) for part in parts])


def _player(state: Any) -> Any:
    """The player's sprite [1]."""
    import jax.numpy as jnp

    return jnp.where(state.is_sleeping, 4, jnp.clip(state.player_direction - 1, 0, 3))[None]


def _turn(directions: Any) -> Any:
    """How projectiles flying in `directions` [n, 2] are turned: flipped + 2 * transposed."""
    flipped = (directions > 0).any(axis=1)
    return flipped + 2 * (directions[:, 1] != 0)


def _window(world: Any, state: Any, where: Layout, outside: float) -> Any:
    """A map's part around the player [rows, columns]; `outside` where that is off the map.

    `world` is [size, size], or [levels, size, size] of which the player's level is taken. Picking
    the view's tiles alone is faster than upstream's slice out of a padded copy.
    """
    import jax.numpy as jnp

    rows = state.player_position[0] + jnp.arange(where.rows)[:, None] - where.rows // 2
    columns = state.player_position[1] + jnp.arange(where.columns) - where.columns // 2
    high, wide = world.shape[-2:]
    within = (rows >= 0) & (rows < high) & (columns >= 0) & (columns < wide)
    level = (state.player_level,) if world.ndim == 3 else ()
    view = world[(*level, jnp.clip(rows, 0, high - 1), jnp.clip(columns, 0, wide - 1))]
    return jnp.where(within, view, jnp.asarray(outside, world.dtype))


def _cells(positions: Any, alive: Any, state: Any, where: Layout) -> Any:
    """View cell of each position [n, 2] that is alive and in view, else NOT_VISIBLE."""
    import jax.numpy as jnp

    size = jnp.array([where.rows, where.columns])
    local = positions - state.player_position + size // 2
    visible = ((local >= 0) & (local < size)).all(axis=1) & alive
    return jnp.where(visible, local[:, 0] * where.columns + local[:, 1], NOT_VISIBLE)


def _pack(where: Layout, **values: Any) -> Any:
    """The fields' bytes in the layout's order. Integers are in 0..255, but for the key."""
    import jax
    import jax.numpy as jnp

    types = {"light": jnp.float32, "daylight": jnp.float32, "key": jnp.uint32}
    values["padding"] = jnp.zeros(where.fields["padding"], jnp.uint8)
    parts = []
    for name, size in where.fields.items():
        value = jnp.asarray(values[name]).astype(types.get(name, jnp.uint8))
        data = value if value.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(value, jnp.uint8)
        parts.append(data.reshape(size))
    return jnp.concatenate(parts)

"""What a player of Craftax has when it begins on a floor: stats, tools, and what it has done.

The lists are ours: what a player who came down by the ladders may well carry, no more. Floors are
0 overworld, 1 dungeon, 2 gnomish mines, 3 sewers, 4 vaults, 5 troll mines, 6 fire, 7 ice and 8
graveyard. On floor k

- the player stands on the ladder up, where the ladder from above ends; the ladders above are open;
- its k points of experience (one for each floor entered) are spent on strength, dexterity and
  intelligence in turn, and health, food, drink, energy and mana are as high as these allow;
- it carries `CARRIED`, has learnt fireball from floor 4 and iceball from floor 5 on, and its sword
  has the ice enchantment of the sewers from floor 4 on;
- achievements that follow from all this (upstream's own rule for what is carried, floors entered,
  and `DONE` on the floors above) are unlocked before the episode, and so pay nothing in it.

Floor 0 is upstream's own beginning, unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from envs import craftax_game, jax_setup
from envs.craftax_game import State
from envs.jax_setup import Program

CARRIED: dict[str, tuple[int, ...]] = {
    "pickaxe": (0, 2, 3, 3, 3, 4, 4, 4, 4),  # 2 stone, 3 iron, 4 diamond
    "sword": (0, 2, 3, 3, 3, 4, 4, 4, 4),
    "bow": (0, 0, 1, 1, 1, 1, 1, 1, 1),
    "arrows": (0, 0, 8, 12, 16, 20, 24, 28, 32),
    "torches": (0, 6, 10, 12, 14, 16, 18, 20, 20),
    "wood": (0, 8, 8, 8, 8, 8, 8, 8, 8),
    "stone": (0, 10, 15, 20, 20, 20, 20, 20, 20),
    "coal": (0, 4, 6, 8, 8, 8, 8, 8, 8),
    "iron": (0, 1, 2, 3, 3, 3, 3, 3, 3),
    "diamond": (0, 0, 0, 2, 2, 1, 1, 1, 1),
    "sapphire": (0, 0, 0, 1, 1, 1, 1, 1, 1),
    "ruby": (0, 0, 0, 1, 1, 1, 1, 1, 1),
    "sapling": (0, 1, 1, 1, 1, 1, 1, 1, 1),
}
"""Field of the inventory -> how many on each floor; there are no potions and no books."""
IRON_PIECES = (0, 0, 1, 2, 4, 4, 4, 4, 4)
DIAMOND_PIECES = (0, 0, 0, 0, 0, 0, 1, 2, 4)
"""Pieces of armour, of four, that are at least of iron, and those of diamond."""
FIREBALL, ICEBALL, ICE_SWORD = 4, 5, 4
"""First floors with the spells, and with the enchanted sword."""
DONE: tuple[tuple[str, ...], ...] = (
    ("place_table", "place_stone", "place_furnace", "place_torch", "eat_cow", "collect_drink",
     "wake_up", "defeat_zombie"),
    ("open_chest", "eat_snail", "fire_bow", "defeat_orc_solider", "defeat_orc_mage"),
    ("eat_bat", "defeat_gnome_warrior", "defeat_gnome_archer", "make_iron_armour"),
    ("learn_fireball", "cast_fireball", "enchant_sword", "defeat_lizard", "defeat_kobold"),
    ("learn_iceball", "cast_iceball", "defeat_knight", "defeat_archer"),
    ("defeat_troll", "defeat_deep_thing", "make_diamond_armour"),
    ("defeat_pigman", "defeat_fire_elemental"),
    ("defeat_frost_troll", "defeat_ice_elemental"),
)  # fmt: skip
"""Floor -> achievements unlocked before it is left, in upstream's names (and spelling)."""
FLOORS = 9


@functools.cache
def program(num_envs: int, kind: str, index: int) -> Callable[[State, Any], State]:
    """Worlds [N] and a floor [] int32 -> the fields of these worlds that begin there otherwise.

    Compiled for a JAX device, "cpu" or "cuda" and its number; made once per process. Applying it
    again to worlds that begin on the floor changes nothing.
    """
    loaded = jax_setup.load(
        f"Craftax kits for {num_envs} environments",
        ["envs.craftax_game", "envs.craftax_kits"],
        jax_setup.device(kind, index),
        lambda: ({"equip": _build(num_envs)}, {}),
    )
    return loaded.run["equip"]


def unlocked(floor: int) -> set[str]:
    """Achievements of `DONE` above a floor, and the floors' entries themselves."""
    from craftax.craftax.constants import LEVEL_ACHIEVEMENT_MAP, Achievement

    entered = [int(value) for value in np.asarray(LEVEL_ACHIEVEMENT_MAP)[1 : floor + 1]]
    names = {Achievement(value).name.lower() for value in entered}
    return names.union(*DONE[:floor])


def _build(num_envs: int) -> Program:
    import jax

    worlds, floor = craftax_game.shapes(num_envs)

    def changed(state: Any, floor: Any) -> State:
        before, after = (craftax_game.by_name(s) for s in (state, equipped(state, floor)))
        return {name: x for name, x in after.items() if x is not before[name]}

    every = jax.vmap(changed, in_axes=(0, None))
    return Program(
        lambda states, floor: every(craftax_game.tree(False, states), floor), (worlds, floor)
    )


def equipped(state: Any, floor: Any) -> Any:
    """A new world with the player on `floor`; on floor 0 as it is."""
    import jax
    import jax.numpy as jnp
    from craftax.craftax.constants import Achievement
    from craftax.craftax.game_logic import calculate_inventory_achievements
    from craftax.craftax.util import game_logic_utils as rules

    flags = np.zeros((FLOORS, len(Achievement)), bool)
    for below in range(FLOORS):
        for name in unlocked(below):
            flags[below, Achievement[name.upper()].value] = True
    level = jnp.asarray(floor, jnp.int32)
    piece = np.arange(4)
    iron, diamond = (jnp.asarray(pieces)[level] for pieces in (IRON_PIECES, DIAMOND_PIECES))
    inventory = state.inventory.replace(
        armour=(piece < iron).astype(jnp.int32) + (piece < diamond),
        **{name: jnp.asarray(counts, jnp.int32)[level] for name, counts in CARRIED.items()},
    )
    above = np.arange(FLOORS) < level
    new = state.replace(
        player_level=level,
        player_position=state.up_ladders[level],
        player_strength=1 + (level + 2) // 3,
        player_dexterity=1 + (level + 1) // 3,
        player_intelligence=1 + level // 3,
        inventory=inventory,
        learned_spells=jnp.stack([level >= FIREBALL, level >= ICEBALL]),
        sword_enchantment=jnp.where(level >= ICE_SWORD, 2, 0).astype(jnp.int32),
        monsters_killed=jnp.where(above, 10, state.monsters_killed),
        achievements=state.achievements | jnp.asarray(flags)[level],
    )
    new = calculate_inventory_achievements(new)
    new = new.replace(
        player_health=rules.get_max_health(new).astype(jnp.float32),
        player_food=rules.get_max_food(new),
        player_drink=rules.get_max_drink(new),
        player_energy=rules.get_max_energy(new),
        player_mana=rules.get_max_mana(new),
    )
    return jax.tree.map(
        lambda old, other: old if old is other else jnp.where(level > 0, other, old), state, new
    )

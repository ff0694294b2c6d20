"""What a frame's code says, field by field, for states edited by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import states
import torch

from dynmoe.errors import UserError
from envs.craftax_code import (
    CLASSIC,
    FULL,
    HUD_CLASSIC,
    HUD_COUNTS,
    NOT_VISIBLE,
    code_size,
    encoder,
    fields,
    layout,
)

GAMES = pytest.mark.parametrize("classic", [False, True], ids=["full", "classic"])


def worlds(classic: bool) -> Any:
    """32 new worlds, free to be edited."""
    import jax

    make, _ = states.game(classic)
    return states.to_numpy(make(jax.random.split(jax.random.PRNGKey(5), 32)))


def parts(classic: bool, edited: Any) -> dict[str, np.ndarray]:
    """Fields of the codes of 32 states."""
    twice = states.join([edited, edited])  # the number that the encoder is compiled for
    codes = torch.from_numpy(states.in_chunks(states.coder(classic), twice))
    assert torch.equal(codes[:32], codes[32:])
    found = fields(codes[:32], layout(classic))
    return {name: part.numpy() for name, part in found.items()}


@GAMES
def test_size_and_order(classic: bool) -> None:
    where = layout(classic)
    assert code_size(classic) == where.size == (116 if classic else 576)
    assert where.size % 4 == 0
    assert all(where.part(name).start % 4 == 0 for name in ("daylight", "key"))
    names = list(where.fields)
    assert [where.part(name).stop for name in names[:-1]] == [
        where.part(name).start for name in names[1:]
    ]
    assert where.frame_shape == ((63, 63, 3) if classic else (130, 110, 3))


@pytest.mark.slow
@GAMES
def test_one_state_without_vmap_or_jit(classic: bool) -> None:
    state = states.take(worlds(classic), 0)
    code = np.asarray(encoder(classic)(state))
    assert code.dtype == np.uint8 and code.shape == (code_size(classic),)
    together = parts(classic, worlds(classic))
    assert np.array_equal(code[layout(classic).part("tiles")], together["tiles"][0])


@GAMES
def test_numbers_are_exact(classic: bool) -> None:
    edited = worlds(classic)
    rng = np.random.default_rng(0)
    edited.light_level[:] = rng.random(32)
    edited.state_rng[:] = rng.integers(0, 2**32, (32, 2))
    found = parts(classic, edited)
    assert np.array_equal(found["daylight"][:, 0], edited.light_level)
    assert np.array_equal(found["key"].view(np.uint32), edited.state_rng)
    assert not found["padding"].any()


def test_typed_keys_are_read_too() -> None:
    import jax

    world = states.take(worlds(True), 0)
    typed = world.replace(state_rng=jax.random.wrap_key_data(jax.numpy.asarray(world.state_rng)))
    raw, found = (np.asarray(encoder(True)(state)) for state in (world, typed))
    assert np.array_equal(raw, found)


@GAMES
def test_view_at_a_corner(classic: bool) -> None:
    edited, where = worlds(classic), layout(classic)
    size = edited.map.shape[-1]
    edited.player_position[:16], edited.player_position[16:] = 0, size - 1
    found = parts(classic, edited)
    tiles = found["tiles"].reshape(32, where.rows, where.columns)
    outside = 1 if classic else 5
    assert (tiles[:16, : where.rows // 2] == outside).all()
    assert (tiles[16:, :, where.columns // 2 + 1 :] == outside).all()
    here = edited.map if classic else edited.map[:, 0]
    corner = here[16:, size - 1 - where.rows // 2 :, size - 1 - where.columns // 2 :]
    shown = tiles[16:, : where.rows // 2 + 1, : where.columns // 2 + 1]
    assert np.array_equal(shown if classic else shown // 5, corner)


def test_light_comes_from_the_players_floor() -> None:
    edited = worlds(False)
    edited.player_level[:] = np.arange(32) % 9
    edited.light_map[:] = np.random.default_rng(0).random(edited.light_map.shape)
    edited.player_position[:] = [24, 1]
    edited.light_level[:] = 0.25
    found = parts(False, edited)
    light = found["light"].reshape(32, 9, 11)
    assert not light[:, :, :4].any()  # off the map
    world = edited.light_map[np.arange(32), edited.player_level]
    assert np.array_equal(light[:, :, 4:], world[:, 20:29, :7])
    assert np.array_equal(found["daylight"][:, 0], np.where(edited.player_level == 0, 0.25, 1))


def test_ladders_and_the_boss() -> None:
    edited = worlds(False)
    edited.player_level[:] = 8
    edited.map[:, 8], edited.item_map[:, 8] = 32, 2
    edited.monsters_killed[:, 8] = np.arange(32) % 16  # open from 8 on
    edited.boss_timesteps_to_spawn_this_round[:] = np.arange(32) // 16
    edited.melee_mobs.mask[3, 8, 1] = edited.ranged_mobs.mask[4, 8, 0] = True
    edited.passive_mobs.mask[5, 8] = edited.melee_mobs.mask[6, 7] = True  # do not matter
    tiles = parts(False, edited)["tiles"]
    assert (tiles == tiles[:, :1]).all()
    assert (tiles[:, 0] % 5).tolist() == ([4] * 8 + [2] * 8) * 2
    vulnerable = [36] * 3 + [32] * 2 + [36] * 11 + [32] * 16
    assert (tiles[:, 0] // 5).tolist() == vulnerable


def test_mobs_in_drawing_order() -> None:
    edited = worlds(False)
    edited.player_level[:] = 2
    edited.player_position[:] = 20
    mobs = (edited.melee_mobs, edited.passive_mobs, edited.ranged_mobs)
    column = 0
    for mob in (*mobs, edited.mob_projectiles, edited.player_projectiles):
        for i in range(mob.mask.shape[2]):
            mob.position[:, 2, i] = [20 + 4, 20 - 5 + column % 11]
            mob.mask[:, 2, i] = True
            mob.type_id[:, 2, i] = i
            column += 1
    edited.passive_mobs.mask[:, 2, 1] = False
    edited.ranged_mobs.position[:16, 2, 0] = [25, 20]  # a row below the view
    edited.ranged_mobs.position[16:, 2, 0] = [20, 14]  # a column left of it
    turns = np.array([[-1, 0], [1, 0], [0, -1]])
    edited.mob_projectile_directions[:, 2] = turns
    edited.player_projectile_directions[:, 2] = [[0, 1], [0, 0], [1, -1]]
    edited.player_direction[:16] = np.repeat([1, 2, 3, 4], 4)
    edited.is_sleeping[16:] = True
    found = parts(False, edited)
    assert found["sprites"][:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 16
    assert (found["sprites"][:, 1:9] == [5, 6, 7, 13, 14, 15, 16, 17]).all()
    assert (found["sprites"][:, 9:] == [24, 29, 34, 27, 28, 35]).all()
    row = [8 * 11 + i % 11 for i in range(14)]
    row[4] = row[6] = NOT_VISIBLE
    assert (found["cells"] == row).all()
    assert (found["asleep"][:, 0] == [0] * 16 + [1] * 16).all()


def test_classic_mobs_in_drawing_order() -> None:
    edited = worlds(True)
    edited.player_position[:] = 20
    for row, name in enumerate(("zombies", "cows", "skeletons", "arrows")):
        mob = getattr(edited, name)
        mob.position[:] = [[17 + row, 16 + i] for i in range(mob.mask.shape[1])]
        mob.mask[:] = True
    edited.cows.mask[:, 2] = False
    edited.arrows.position[:, 0] = [24, 20]  # a row below the view
    edited.arrow_directions[:] = [[-1, 0], [1, 0], [0, 1]]
    found = parts(True, edited)
    assert (found["sprites"][:, 1:] == [5, 5, 5, 6, 6, 6, 7, 7, 8, 9, 11]).all()
    gone = NOT_VISIBLE
    assert (found["cells"] == [0, 1, 2, 9, 10, gone, 18, 19, gone, 28, 29]).all()


def test_hud_of_both_games() -> None:
    edited = worlds(False)
    for i, name in enumerate(HUD_COUNTS):
        holder = edited if name.startswith("player") else edited.inventory
        getattr(holder, name)[:] = 40 + i
    edited.player_health[:] = np.resize([-2.0, 0.5, 1.9, 7.3], 32)
    edited.inventory.potions[:] = np.arange(6)
    edited.inventory.arrows[:], edited.bow_enchantment[:] = 120, 2
    edited.player_level[:], edited.player_xp[:] = 3, 44
    edited.learned_spells[:] = [False, True]
    edited.inventory.sword[:], edited.sword_enchantment[:] = 4, 1
    edited.inventory.armour[:], edited.armour_enchantments[:] = [0, 1, 2, 1], [0, 1, 2, 0]
    hud = parts(False, edited)["hud"]
    assert (hud[:, 0] == np.resize([1, 1, 1, 7], 32)).all()
    assert (hud[:, 1:15] == np.arange(41, 55)).all()
    assert (hud[:, 15:22] == [0, 1, 2, 3, 4, 5, 99]).all()
    assert (hud[:, 22:] == [3, 9, 1, 1, 1, 0, 1, 0, 0, 13, 0, 4, 8, 3, 2]).all()
    assert hud.shape[1] == FULL.fields["hud"]

    edited = worlds(True)
    for i, name in enumerate(HUD_CLASSIC):
        holder = edited if name.startswith("player") else edited.inventory
        getattr(holder, name)[:] = i
    hud = parts(True, edited)["hud"]
    assert (hud == np.minimum(np.arange(CLASSIC.fields["hud"]), 9)).all()


@pytest.mark.parametrize(
    ("name", "value"), [("jax_threefry_partitionable", False), ("jax_default_prng_impl", "rbg")]
)
def test_other_random_numbers_are_refused(name: str, value: Any) -> None:
    import jax

    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=f"{name} is {value!r}") as caught:
            encoder(True)
    finally:
        jax.config.update(name, before)
    assert "\n" not in str(caught.value)

"""Craftax's textures as the tables that the renderer copies from.

Upstream's textures of the one needed size are made from the package's images, in memory: upstream's
own loader would make three sizes and write them into the installed package. As that takes jax and
seconds, the tables are kept in this project's cache folder.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any, NamedTuple

import numpy as np

from dynmoe.errors import UserError
from dynmoe.lab.cache import Arrays, digest, load_or_make
from envs.craftax_code import CLASSIC, FULL, Layout

ROW = 32
"""values per row of a cell in a table: RGB of up to 10 pixels and then some, as vector instructions
like it"""
ARROWS = 28
"""place of the arrows in Craftax's hud"""
FORM = 1
"""increase when the tables below change, so that old cache files are not used"""


class Tables(NamedTuple):
    """All that a frame is composed of. T is the side of a tile in pixels, 8-bit values are 0..255.

    Attributes:
        cells: [n, T, ROW] first the map's tiles, then one black, then those of the hud; uint8, or
            float32 in Classic.
        start: [hud cells] int32, the cell that each place of the hud shows while all is 0.
        place: [hud bytes] int32, the place that each byte of the code's hud belongs to.
        step: [hud bytes] int32, how far one unit of that byte moves on from `start`.
        keep: [s, T, ROW] what is left of the ground under each sprite, 0..1, of cells' type.
        paint: [s, T, ROW] what the sprite adds. The last sprite is nothing at all.
        noise: [rows * T, columns * T] float32, strength of the night's noise over the map.
    """

    cells: np.ndarray
    start: np.ndarray
    place: np.ndarray
    step: np.ndarray
    keep: np.ndarray
    paint: np.ndarray
    noise: np.ndarray


def tables(classic: bool) -> Tables:
    """A game's tables, from the cache where they are there.

    Raises:
        UserError: the package craftax is not installed.
    """
    try:
        version = metadata.version("craftax")
    except metadata.PackageNotFoundError:
        raise UserError("the package craftax is not installed; run: pip install craftax") from None
    name = "craftax-classic" if classic else "craftax"
    key = digest({"craftax": version, "form": FORM})
    return Tables(
        **load_or_make(f"{name}-textures-{key}", _make_classic if classic else _make_full)
    )


def _textures(module: str, size: int) -> dict[str, Any]:
    """Upstream's textures of `size` pixels as numpy arrays."""
    constants = import_module(module)
    found = constants.load_all_textures_given_size(size)
    return {name: np.asarray(value) for name, value in found.items() if name != "player_textures"}


def _make_full() -> Arrays:
    t = _textures("craftax.craftax.constants", FULL.tile)
    tiles = [
        _over(block, item) if i else block
        for block in t["block_textures"]
        for i, item in enumerate(t["full_map_item_textures"][:, : FULL.tile, : FULL.tile])
    ]
    colours, alphas = _player(t, FULL)
    for kind in ("melee_mob", "passive_mob", "ranged_mob", "projectile"):
        pictures = (t[f"{kind}_textures"], t[f"{kind}_texture_alphas"])
        turned = [_turned(p) if kind == "projectile" else p for p in pictures]
        colours, alphas = np.concatenate([colours, turned[0]]), np.concatenate([alphas, turned[1]])
    slots = [*_full_counts(t), *_full_others(t)]
    return _pack(FULL, tiles, slots, colours, alphas, t, np.uint8)


def _full_counts(t: dict[str, Any]) -> list[tuple[int, list[np.ndarray]]]:
    """The slots that show a number 0..99, as (place, cell for each value)."""
    block = t["smaller_block_textures"]
    icons = {
        **{0: t["health_texture"], 1: t["hunger_texture"], 2: t["thirst_texture"]},
        **{3: t["energy_texture"], 4: t["mana_texture"]},
        **{11: block[8], 12: block[9], 13: block[10], 14: block[21], 15: block[22]},
        **{16: t["sapling_texture"], 22: block[6], 23: block[4]},
        **{24: t["torch_inv_texture"], 25: t["book_texture"]},
        **{33 + i: potion for i, potion in enumerate(t["potion_textures"])},
    }
    slots = [(place, _numbers(t, icon)) for place, icon in icons.items()]
    arrows = _numbers(t, t["player_projectile_textures"][0])
    enchanted = [
        _over(cell, _framed(charm)) if count else cell
        for charm in t["arrow_enchantment_textures"]
        for count, cell in enumerate(arrows)
    ]
    return [*slots, (ARROWS, enchanted)]


def _full_others(t: dict[str, Any]) -> list[tuple[int, list[np.ndarray]]]:
    """The slots that show a digit, or a thing and how it is enchanted."""
    nothing = t["smaller_empty_texture"]
    digits = [(6, nothing, nothing), (9, nothing, t["xp_texture"])]
    for place, name in ((20, "dex"), (31, "str"), (42, "int")):
        digits.append((place, t[f"{name}_texture"], t[f"{name}_texture"]))
    slots = [
        (place, [_digit(t, _framed(some if n else none), n) for n in range(10)])
        for place, none, some in digits
    ]
    for place, name in ((26, "fireball"), (27, "iceball")):
        slots.append((place, [_framed(nothing), _framed(t[f"{name}_inv_texture"])]))
    slots.append((17, [_framed(bow) for bow in t["bow_textures"]]))
    slots.append((30, [_framed(pickaxe) for pickaxe in t["pickaxe_textures"]]))
    things = [(19, t["sword_textures"], t["sword_enchantment_textures"])]
    for i, place in enumerate((7, 18, 29, 40)):
        things.append((place, t["armour_textures"][:, i], t["armour_enchantment_textures"][:, i]))
    for place, kinds, charms in things:
        both = [_over(_framed(kind), _framed(charm)) for kind in kinds for charm in charms]
        slots.append((place, both))
    return slots


def _make_classic() -> Arrays:
    t = _textures("craftax.craftax_classic.constants", CLASSIC.tile)
    colours, alphas = _player(t, CLASSIC)
    for name in ("zombie", "cow", "skeleton", "arrow"):
        pair = (t[f"{name}_texture"][None], t[f"{name}_texture_alpha"][None])
        turned = [_turned(p) if name == "arrow" else p for p in pair]
        colours, alphas = np.concatenate([colours, turned[0]]), np.concatenate([alphas, turned[1]])
    block = t["smaller_block_textures"]
    icons = [t[f"{name}_texture"] for name in ("health", "hunger", "thirst", "energy", "sapling")]
    icons += [block[i] for i in (6, 4, 8, 9, 10)]
    tools = [
        f"{kind}_{tool}" for tool in ("pickaxe", "sword") for kind in ("wood", "stone", "iron")
    ]
    icons += [t[f"{tool}_texture"] for tool in tools]
    slots = []
    for place, icon in enumerate(icons):
        cells = []
        for number in range(10):
            cell = np.zeros((7, 7, 3), np.float32)
            cell[:5, :5] = icon if number else 0
            ground = cell[2:6, 2:6] * (1 - t["number_textures_alpha"][number])
            cell[2:6, 2:6] = ground + t["number_textures"][number]
            cells.append(cell)
        slots.append((place, cells))
    return _pack(CLASSIC, list(t["block_textures"]), slots, colours, alphas, t, np.float32)


def _player(t: dict[str, Any], where: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The player's five pictures and their alpha [5, T, T, 3], cut from upstream's whole maps."""
    y, x = where.rows // 2 * where.tile, where.columns // 2 * where.tile
    box = (slice(None), slice(y, y + where.tile), slice(x, x + where.tile))
    return t["full_map_player_textures"][box], t["full_map_player_textures_alpha"][box]


def _turned(pictures: np.ndarray) -> np.ndarray:
    """Each picture [n, T, T, 3] as it is, flipped, transposed, and both: [4n, T, T, 3]."""
    both = np.stack([pictures, pictures[:, ::-1]], axis=1)
    four = np.concatenate([both, both.swapaxes(2, 3)], axis=1)
    return four.reshape(-1, *pictures.shape[1:])


def _over(ground: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A picture with alpha 0 or 1 [T, T, 4] upon a ground [T, T, 3]."""
    alpha = picture[..., 3:]
    return ground * (1 - alpha) + picture[..., :3] * alpha


def _framed(icon: np.ndarray) -> np.ndarray:
    """A hud icon [8, 8, C] in its cell [10, 10, C]."""
    return np.pad(icon, ((1, 1), (1, 1), (0, 0)))


def _digit(t: dict[str, Any], cell: np.ndarray, number: int, zero: bool = False) -> np.ndarray:
    """The cell with a digit at its lower right; 0 is blank unless `zero`."""
    form = "_with_zero" if zero else ""
    cell = cell.copy()
    ground = cell[6:, 6:] * (1 - t[f"number_textures_alpha{form}"][number])
    cell[6:, 6:] = ground + t[f"number_textures{form}"][number]
    return cell


def _numbers(t: dict[str, Any], icon: np.ndarray) -> list[np.ndarray]:
    """Cells of a count 0..99: nothing for 0, else the icon and one or two digits."""
    cells = []
    for number in range(100):
        tens, ones = divmod(number, 10)
        cell = _digit(t, _framed(icon if number else icon * 0), ones, zero=number > 0)
        ground = cell[6:, 2:6] * (1 - t["number_textures_alpha"][tens])
        cell[6:, 2:6] = ground + t["number_textures"][tens]
        cells.append(cell)
    return cells


def _pack(
    where: Layout,
    tiles: list[np.ndarray],
    slots: list[tuple[int, list[np.ndarray]]],
    colours: np.ndarray,
    alphas: np.ndarray,
    textures: dict[str, Any],
    dtype: Any,
) -> Arrays:
    """The arrays of `Tables`."""
    cells = [*tiles, np.zeros((where.tile, where.tile, 3))]
    start = np.full(where.hud_rows * where.hud_columns, len(tiles), np.int32)
    for place, shown in slots:
        start[place] = len(cells)
        cells.extend(shown)
    places, steps = [place for place, _ in slots], [1] * len(slots)
    if where is FULL:  # the last byte, the arrows' enchantment
        places, steps = [*places, ARROWS], [*steps, 100]
    nothing = np.zeros((1, where.tile, where.tile, 3), np.float32)
    alphas = np.concatenate([alphas.astype(np.float32), nothing])
    colours = np.concatenate([colours.astype(np.float32), nothing])
    return {
        "cells": _rows(np.stack(cells), dtype),
        "start": start,
        "place": np.array(places, np.int32),
        "step": np.array(steps, np.int32),
        "keep": _rows(1 - alphas, dtype, beyond=1),
        "paint": _rows(colours * alphas, dtype),
        "noise": textures["night_noise_intensity_texture"][..., 0].astype(np.float32),
    }


def _rows(cells: np.ndarray, dtype: Any, beyond: int = 0) -> np.ndarray:
    """Cells [n, T, T, 3] as [n, T, ROW], filled up with the value `beyond`."""
    count, side = cells.shape[:2]
    flat = cells.reshape(count, side, side * 3)
    fill = ((0, 0), (0, 0), (0, ROW - side * 3))
    return np.pad(flat, fill, constant_values=beyond).astype(dtype)

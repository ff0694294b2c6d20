"""Floors of Craftax as domains: what is on the pictures, told by the game's own state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from craftax.craftax import constants

from cl_benchmarks.domains.craftax import CLASSES, FLOORS, CraftaxFloors
from dynmoe.errors import UserError
from envs.craftax_scenes import Scenes

PER_CLASS = 6
FACED = {
    "overworld": {"TREE": "tree", "WATER": "sea", "GRASS": "ground"},
    "gnomish-mines": {"STALAGMITE": "tree", "WATER": "sea", "PATH": "ground"},
    "fire-realm": {"FIRE_TREE": "tree", "LAVA": "sea", "FIRE_GRASS": "ground"},
    "ice-realm": {"ICE_SHRUB": "tree", "WATER": "sea", "ICE_GRASS": "ground"},
}
"""Blocks that a floor must show, and their class; each is made by the floor's own generator."""
ANYWHERE = {"STONE": "rock", "COAL": "ore", "IRON": "ore", "DIAMOND": "ore", "SAPPHIRE": "ore",
            "RUBY": "ore", "SAND": "ground", "PATH": "ground", "LAVA": "sea"}  # fmt: skip

pytestmark = pytest.mark.slow  # worlds are made, which takes half a minute


def floors(**options: Any) -> CraftaxFloors:
    return CraftaxFloors(CraftaxFloors.Config(**{"per_class": PER_CLASS, **options}))


@pytest.fixture(scope="module")
def scenes(own_cache: Path) -> Scenes:
    return Scenes(0)


def block_faced(scenes: Scenes, place: np.ndarray) -> tuple[str, list[int]]:
    """The block before a player, by upstream's directions, and its row and column."""
    world, floor, row, column, facing = place
    step = np.asarray(constants.DIRECTIONS)[facing + 1]
    tile = [int(row + step[0]), int(column + step[1])]
    return constants.BlockType(int(scenes.maps[world, floor, tile[0], tile[1]])).name, tile


@pytest.mark.parametrize("floor", FACED)
def test_the_class_is_what_the_player_faces(floor: str, scenes: Scenes) -> None:
    places = floors().places(scenes, floor)
    assert places.shape == (len(CLASSES) * PER_CLASS, 5) and (places[:, 1] == FLOORS[floor]).all()
    assert len(set(places[:, 4])) == 4  # players face all ways
    known, seen = {**ANYWHERE, **FACED[floor]}, set()
    solid = np.asarray(constants.SOLID_BLOCK_MAPPING)
    for number, place in enumerate(places):
        name, tile = block_faced(scenes, place)
        assert known[name] == list(CLASSES)[number // PER_CLASS], (floor, name)
        seen.add(name)
        world, _, row, column, _ = place
        here = scenes.maps[world, FLOORS[floor], row, column]
        assert not solid[here] and known[constants.BlockType(int(here)).name] == "ground"
        items = scenes.items[world, FLOORS[floor]]
        assert items[row, column] == 0 and items[tuple(tile)] == 0
    assert set(FACED[floor]) <= seen


@pytest.mark.parametrize("view", [3, 7])
def test_no_tile_is_on_two_pictures(view: int, scenes: Scenes) -> None:
    places = floors(view=view).places(scenes, "fire-realm")
    shown = np.zeros((len(scenes.maps), 48, 48), int)
    half = view // 2
    for place in places:
        _, (row, column) = block_faced(scenes, place)
        rows, columns = slice(row - half, row + half + 1), slice(column - half, column + half + 1)
        shown[place[0], rows, columns] += 1
    assert shown.max() == 1 and shown.sum() == view**2 * len(places)


def test_places_do_not_depend_on_worlds_made_for_others(scenes: Scenes) -> None:
    """Nor on the order of the floors."""
    fresh = Scenes(0)
    alone = floors().places(fresh, "overworld")
    before = len(fresh.maps)
    floors(per_class=40).places(fresh, "ice-realm")
    assert len(fresh.maps) > before  # one block had too few ores
    assert (floors().places(fresh, "overworld") == alone).all()
    assert (floors(seed=1).places(fresh, "overworld") != alone).any()


@pytest.mark.parametrize("view", [3, 5])
def test_the_tile_that_is_faced_is_in_the_middle(view: int, scenes: Scenes) -> None:
    """By day trees look alike wherever they are, and so must the middles of their pictures."""
    data = floors(view=view, floors=("overworld", "fire-realm")).load()
    middle = slice(view // 2 * 10, view // 2 * 10 + 10)
    tree = list(CLASSES).index("tree")
    looks = []
    for domain in data.domains:
        assert isinstance(domain.images, torch.Tensor)
        assert domain.images.shape == (5 * PER_CLASS, 3, 10 * view, 10 * view)
        tiles = domain.images[domain.labels == tree, :, middle, middle].float()
        assert (tiles - tiles[0]).abs().max() <= 1
        looks.append(tiles[0])
    assert (looks[0] - looks[1]).abs().mean() > 20  # trees of two floors


def test_pictures_are_parts_of_the_games_frames(scenes: Scenes) -> None:
    """The player is beside the middle, on the side that it faces from."""
    made = floors(floors=("overworld", "ice-realm")).load().domains[0].images
    places = floors().places(scenes, "overworld")
    frames = scenes.frames(places)
    assert frames.shape == (len(places), 3, 130, 110)
    sprites = []
    for picture, frame, place in zip(made, frames, places, strict=True):
        assert isinstance(picture, torch.Tensor)
        step = np.asarray(constants.DIRECTIONS)[place[4] + 1]
        top, left = (1 - step) * 10
        player = picture[:, top : top + 10, left : left + 10]
        assert torch.equal(player, frame[:, 40:50, 50:60])
        sprites.append((int(place[4]), int(place[2]), player.float()))
    left = [player for facing, _, player in sprites if facing == 0]
    right = [player for facing, _, player in sprites if facing == 1]
    assert (left[0].flip(2) - right[0]).abs().mean() < (left[0] - right[0]).abs().mean()


def test_dark_floors_are_lit_where_the_player_is(scenes: Scenes) -> None:
    """The tile that is faced has four fifths of the light, one four tiles away a fifth."""
    places = floors().places(scenes, "gnomish-mines")
    ground = places[-PER_CLASS:]
    frames = scenes.frames(ground).float()
    for frame, place in zip(frames, ground, strict=True):
        step = np.asarray(constants.DIRECTIONS)[place[4] + 1]
        top, left = (np.array([4, 5]) + step) * 10
        assert frame[:, top : top + 10, left : left + 10].mean() > 30
    assert frames[:, :, :90].mean(dim=(1, 2, 3)).max() < frames[:, :, 40:50, 50:60].mean()


def test_domains_differ_in_pixels_and_classes_are_balanced(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = floors(per_class=7).load()
    assert "making worlds" in capsys.readouterr().err
    assert data.names == list(FACED) and list(data.classes) == list(CLASSES)
    for domain in data.domains:
        assert domain.labels.bincount().tolist() == [7] * 5
    colours = [d.images.float().mean(dim=(0, 2, 3)) for d in data.domains]  # type: ignore[union-attr]
    for i, one in enumerate(colours):
        for other in colours[i + 1 :]:
            assert (one - other).norm() > 20
    again = floors(per_class=7).load()
    assert capsys.readouterr().err == ""  # from the cache
    for path in (own_cache / "dynmoe").glob("craftax-floors-*"):
        path.unlink()
    for one, two, three in zip(
        data.domains, again.domains, floors(per_class=7).load().domains, strict=True
    ):
        assert isinstance(one.images, torch.Tensor) and isinstance(two.images, torch.Tensor)
        assert isinstance(three.images, torch.Tensor)
        assert torch.equal(one.images, two.images) and torch.equal(one.images, three.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floors": ("overworld",)}, "floors overworld: name two or more"),
        ({"floors": ("overworld", "overworld")}, "each once"),
        ({"floors": ("overworld", "ice-relm")}, "unknown floor 'ice-relm'.*Did you mean 'ice-rea"),
        ({"per_class": 4}, "per_class 4 is out of range; use 5 to 200"),
        ({"per_class": 201}, "per_class 201 is out of range"),
        ({"view": 4}, "view 4 is out of range; use 3, 5 or 7"),
    ],
)
def test_bad_floors_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        floors(**options)
    assert "\n" not in str(error.value)

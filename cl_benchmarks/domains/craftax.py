"""Floors of Craftax as domains; pictures are made on the spot and kept in the cache.

Five floors come from one generator (upstream's `SmoothGenConfig`), which gives each the same five
things in other shapes and colours: that is the class. The dungeons between them lack most of these.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.domain_set import Domain, DomainData, DomainSet
from dynmoe import seeding
from dynmoe.errors import UserError, unknown
from dynmoe.lab import cache

if TYPE_CHECKING:
    from envs.craftax_scenes import Scenes

VERSION = 1
"""Raise it when the same options give other pictures: cached ones are then made again."""
FLOORS = {"overworld": 0, "gnomish-mines": 2, "troll-mines": 5, "fire-realm": 6, "ice-realm": 7}
"""Name of a domain -> the floor's number in the game."""
CLASSES = {
    "ore": ("COAL", "IRON", "DIAMOND", "SAPPHIRE", "RUBY"),
    "tree": ("TREE", "STALAGMITE", "FIRE_TREE", "ICE_SHRUB"),
    "sea": ("WATER", "LAVA"),
    "rock": ("STONE",),
    "ground": ("GRASS", "SAND", "PATH", "FIRE_GRASS", "ICE_GRASS"),
}
"""Class -> blocks, in the generator's words; the rarest come first, as they are placed first."""
GROUND = len(CLASSES) - 1
MOST = 200
"""pictures of a class on a floor, for which some 500 worlds are made"""
TILE, MIDDLE = 10, (4, 5)
"""Pixels of a tile, and the player's tile in a frame."""


class CraftaxFloors(
    DomainData, name="craftax", source="ours; worlds of Matthews et al. 2024 (arXiv 2402.16801)"
):
    """Floors of Craftax; the class is what the player faces: ore, tree, sea, rock or ground.

    The tile that the player faces is in the middle of the picture, the player beside it. No tile is
    on two pictures.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DomainData.Config):
        """Options of Craftax's floors."""

        floors: tuple[str, ...] = ("overworld", "gnomish-mines", "fire-realm", "ice-realm")
        """the domains: some of overworld, gnomish-mines, troll-mines, fire-realm, ice-realm"""
        per_class: int = 60
        """pictures of each of the 5 classes in each domain, 5 to 200"""
        view: int = 3
        """tiles on a side of the picture, 3, 5 or 7; a tile has 10 pixels"""
        seed: int = 0
        """of worlds and places; no part of a run's seed, as a downloaded set has none"""

    def __init__(self, config: Config) -> None:
        for floor in config.floors:
            if floor not in FLOORS:
                raise unknown("floor", floor, FLOORS)
        if len(set(config.floors)) != len(config.floors) or len(config.floors) < 2:
            raise UserError(f"floors {' '.join(config.floors)}: name two or more, each once")
        if not 5 <= config.per_class <= MOST:
            raise UserError(
                f"domains per_class {config.per_class} is out of range; use 5 to {MOST}"
            )
        if config.view not in (3, 5, 7):
            raise UserError(f"domains view {config.view} is out of range; use 3, 5 or 7")
        super().__init__(config)

    def load(self) -> DomainSet:
        """Images in order of class; the same pixels at each call.

        Raises:
            UserError: jax or craftax is not installed.
        """
        c = self.config
        labels = torch.arange(len(CLASSES)).repeat_interleave(c.per_class)
        key = cache.digest({"version": VERSION, **asdict(c), **_versions()})
        images = cache.load_or_make(f"craftax-floors-{key}", self._make)
        domains = tuple(Domain(f, torch.from_numpy(images[f]), labels) for f in c.floors)
        return DomainSet("craftax floors", domains, tuple(CLASSES))

    def _make(self) -> cache.Arrays:
        """Images uint8 [5 * per_class, 3, S, S] by floor."""
        from envs.craftax_scenes import Scenes

        cache.notice("craftax floors: making worlds and pictures (once)")
        scenes = Scenes(self.config.seed)
        return {floor: self._pictures(scenes, floor).numpy() for floor in self.config.floors}

    def _pictures(self, scenes: Scenes, floor: str) -> Tensor:
        from envs.craftax_scenes import STEPS

        found = self.places(scenes, floor)
        frames, side = scenes.frames(found), self.config.view
        pictures = torch.empty(len(found), 3, side * TILE, side * TILE, dtype=torch.uint8)
        for picture, frame, facing in zip(pictures, frames, found[:, 4], strict=True):
            top, left = (np.array(MIDDLE) + STEPS[facing] - side // 2) * TILE
            picture.copy_(frame[:, top : top + side * TILE, left : left + side * TILE])
        return pictures

    def places(self, scenes: Scenes, floor: str) -> np.ndarray:
        """Where players stand on a floor, [5 * per_class, 5] as `Scenes.frames` takes them.

        In the fewest blocks of worlds that have enough places of each class.
        """
        from envs.craftax_scenes import BLOCK

        found: list[list[int]] = []
        count = 0
        while len(found) < len(CLASSES) * self.config.per_class:
            count += BLOCK
            if len(scenes.maps) < count:
                scenes.make_more()
            found = self._places(scenes, count, FLOORS[floor])
        return np.array(found)

    def _places(self, scenes: Scenes, count: int, level: int) -> list[list[int]]:
        """The same in the first `count` worlds; fewer rows if these have too few places."""
        kinds, free = _classes(scenes)[:count, level], scenes.items[:count, level] == 0
        shown = np.zeros(kinds.shape, bool)  # tiles that are on a picture
        half, found = self.config.view // 2, []
        rng = np.random.default_rng(seeding.derive(self.config.seed, "places", level))
        for label in range(len(CLASSES)):
            left = self.config.per_class
            for world, row, column, y, x, facing in self._candidates(kinds, free, label, rng):
                if not left:
                    break
                window = shown[
                    world, row - half : row + half + 1, column - half : column + half + 1
                ]
                if not window.any():
                    window[:] = True
                    found.append([world, level, y, x, facing])
                    left -= 1
            if left:
                return found
        return found

    def _candidates(
        self, kinds: np.ndarray, free: np.ndarray, label: int, rng: np.random.Generator
    ) -> list[list[int]]:
        """World, tile, player's place and facing: where that class can be faced, shuffled."""
        from envs.craftax_scenes import STEPS

        tiles = rng.permutation(np.argwhere((kinds == label) & free))
        facing = rng.integers(len(STEPS), size=len(tiles))
        half, side = self.config.view // 2, kinds.shape[1]
        inside = ((half <= tiles[:, 1:]) & (tiles[:, 1:] < side - half)).all(axis=1)
        tiles, facing = tiles[inside], facing[inside]
        player = tiles[:, 1:] - STEPS[facing]
        own = (tiles[:, 0], player[:, 0], player[:, 1])
        stands = (kinds[own] == GROUND) & free[own]
        return np.column_stack([tiles, player, facing])[stands].tolist()


def _classes(scenes: Scenes) -> np.ndarray:
    """[W, 9, 48, 48] the class of each tile, -1 for other blocks."""
    table = np.full(max(scenes.blocks.values()) + 1, -1)
    for number, blocks in enumerate(CLASSES.values()):
        table[[scenes.blocks[name] for name in blocks]] = number
    return table[scenes.maps]


def _versions() -> dict[str, str]:
    """Of the packages that decide the worlds; none where they are not installed."""
    return {d.name: d.version for d in metadata.distributions() if d.name in ("craftax", "jax")}

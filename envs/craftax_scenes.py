"""Staged pictures of Craftax: a player put anywhere into a world, at noon and by torchlight.

Worlds are upstream's own and nothing moves in them. Light is that of the place plus a torch's at
the player, whose range is upstream's: without it most of the mines and of the ice would be black.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynmoe import seeding
from envs import craftax_game, jax_setup
from envs.craftax_render import Renderer

BLOCK = 16
"""worlds made, and pictures taken, at a time"""
STEPS = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]])
"""Rows and columns to the tile that a player faces: left, right, up, down (upstream's 1 to 4)."""
TORCH = 5.0
"""tiles at which a torch's light has faded"""


class Scenes:
    """Worlds 0, 1, ... of a seed, made when they are asked for.

    Args:
        seed: decides every world by its number.

    Attributes:
        blocks: name of each kind of block, such as "TREE" -> its number.
        maps: [W, 9, 48, 48] blocks of the worlds made so far, by floor, row and column.
        items: [W, 9, 48, 48] what lies there, 0 for nothing.

    Raises:
        UserError: jax or craftax is not installed.
    """

    def __init__(self, seed: int) -> None:
        jax = jax_setup.prepare()
        with jax_setup.quiet():
            self._make = jax.jit(jax.vmap(craftax_game.game(classic=False).make))
            from craftax.craftax.constants import BlockType
        self.blocks = {block.name: int(block.value) for block in BlockType}
        self.maps = self.items = np.zeros((0, 0))
        self._key = jax.random.key(seeding.derive(seed, "scenes") % 2**32)
        self._worlds: list[Any] = []  # of BLOCK each
        self._see = jax.jit(jax.vmap(_codes, in_axes=(None, 0, 0, 0, 0)))
        self._draw = Renderer(classic=False, device="cpu")

    def make_more(self) -> None:
        """Make the next BLOCK worlds."""
        import jax

        first = BLOCK * len(self._worlds)
        numbers = np.arange(first, first + BLOCK)
        keys = jax.vmap(lambda number: jax.random.fold_in(self._key, number))(numbers)
        self._worlds.append(self._make(jax.random.key_data(keys)))
        self.maps = np.concatenate([np.asarray(w.map) for w in self._worlds])
        self.items = np.concatenate([np.asarray(w.item_map) for w in self._worlds])

    def frames(self, places: np.ndarray) -> Tensor:
        """What players see who stand at `places`.

        Args:
            places: int [n, 5]: world, floor, row, column, and the row of STEPS that they face.

        Returns:
            uint8 [n, 3, 130, 110]: 9 x 11 tiles of 10 pixels with the player's in the middle, and
            the inventory below.
        """
        codes = torch.empty(len(places), self._draw.code_size, dtype=torch.uint8)
        for number, worlds in enumerate(self._worlds):
            own = np.flatnonzero(places[:, 0] // BLOCK == number)
            for rows in np.split(own, range(BLOCK, len(own), BLOCK)):
                if not len(rows):
                    continue
                world, floor, row, column, facing = places[np.resize(rows, BLOCK)].T
                position = np.stack([row, column], axis=1)
                seen = self._see(worlds, world % BLOCK, floor, position, facing + 1)
                codes[rows] = torch.from_numpy(np.array(seen)[: len(rows)])
        return self._draw.uint8(codes).permute(0, 3, 1, 2)


def _codes(worlds: Any, world: Any, floor: Any, position: Any, direction: Any) -> Any:
    """The code of one frame (`envs.craftax_code`), in JAX."""
    import jax
    import jax.numpy as jnp
    from craftax.craftax.util.maths_utils import get_distance_map

    from envs.craftax_code import encoder

    state = jax.tree.map(lambda leaf: leaf[world], worlds)
    size = state.light_map.shape[1:]
    torchlight = jnp.clip(1 - get_distance_map(position, size) / TORCH, 0, 1)
    light = state.light_map.at[floor].set(jnp.clip(state.light_map[floor] + torchlight, 0, 1))
    staged = state.replace(
        player_level=floor, player_position=position, player_direction=direction, light_map=light
    )
    return encoder(classic=False)(staged)

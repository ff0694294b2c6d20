"""Random numbers that belong to a module: saved with it, the same on every device.

torch's generators cannot be traced by torch.compile, and their state is no tensor. Here every
number is a hash of a seed, the optimizer step, the draw within the step and the place within the
draw: `state_dict` holds all there is to know, compiled graphs draw the same numbers as eager code,
and a pass that is recomputed (see `dynmoe.moe.passes`) draws the same numbers again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynmoe.moe.draws import draw_seed
from dynmoe.moe.passes import Passes, new_pass

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
WITHOUT_GRADIENT = 2**40
"""Passes without gradient are counted from here, so that acting leaves training's numbers alone."""


class Noise(nn.Module):
    """A stream of random numbers for forward passes.

    In evaluation mode it is silent: `uniform` gives 0.5, `normal` 0, and nothing is counted.

    Attributes:
        seed: buffer [1] int64, drawn from the generator given.
        step: buffer [1] int64, optimizer steps so far (see `dynmoe.moe.step`).
        drawn: buffer [2] int64, draws in this step, in passes with and without gradient; not saved.
    """

    seed: Tensor
    step: Tensor
    drawn: Tensor

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.register_buffer("seed", torch.empty(1, dtype=torch.long))
        self.register_buffer("step", torch.empty(1, dtype=torch.long))
        self.register_buffer("drawn", torch.empty(2, dtype=torch.long), persistent=False)
        self._passes = Passes()
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again with a new seed."""
        draw_seed(self.seed, generator)
        self.step.zero_()
        self._forget()

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers between 0 and 1, of the shape, dtype and device of `like`."""
        return self._draw(like).to(like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of the shape, dtype and device of `like` (inverse of erf)."""
        return (math.sqrt(2.0) * torch.erfinv(2.0 * self._draw(like) - 1.0)).to(like.dtype)

    def finish_step(self) -> None:
        """An optimizer step is done; without a draw since the last one nothing changes."""
        self.step += self.drawn.any()
        self._forget()

    def _forget(self) -> None:
        self.drawn.zero_()
        self._passes.clear()

    def _draw(self, like: Tensor) -> Tensor:
        """Numbers inside (0, 1) in float32 or wider, from hashes of consecutive integers."""
        wide = torch.promote_types(like.dtype, torch.float32)
        if not self.training:
            return torch.full_like(like, 0.5, dtype=wide)
        order = self._passes.recall(new_pass(), self._next)
        key = scramble(scramble(self.seed + self.step * GOLDEN) + order * GOLDEN)
        place = torch.arange(1, like.numel() + 1, device=like.device)
        z = scramble(key + place * GOLDEN)
        # With 23 bits and a half, float32 holds every value exactly and none is 0 or 1.
        return ((_shift(z, 41).to(wide) + 0.5) * 2.0**-23).view(like.shape)

    def _next(self) -> Tensor:
        """[1] which draw of this step comes now."""
        lane = 0 if torch.is_grad_enabled() else 1
        order = self.drawn[lane : lane + 1] + lane * WITHOUT_GRADIENT
        self.drawn[lane] += 1
        return order


def scramble(z: Tensor) -> Tensor:
    """Hash int64 numbers of any shape: SplitMix64's output function.

    Steele et al. 2014, "Fast splittable pseudorandom number generators", Figure 17.
    """
    z = (z ^ _shift(z, 30)) * MIX[0]
    z = (z ^ _shift(z, 27)) * MIX[1]
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)

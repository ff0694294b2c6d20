"""Random numbers that belong to a module: counted, saved with it, the same on every device.

torch's generators cannot be traced by torch.compile, and their state is no tensor. Here draw i of
a source is a hash of its seed and of i, both buffers: `state_dict` holds all there is to know, and
a compiled graph draws the same numbers as eager code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class Noise(nn.Module):
    """A stream of random numbers for forward passes.

    In evaluation mode it is silent: `uniform` gives 0.5, `normal` 0, and nothing is counted.

    Attributes:
        seed: buffer [1] int64, drawn from the generator given.
        drawn: buffer [1] int64, how many numbers have been drawn.
    """

    seed: Tensor
    drawn: Tensor

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(2**62, (1,), generator=generator))
        self.register_buffer("drawn", torch.zeros(1, dtype=torch.long))

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers between 0 and 1, of the shape, dtype and device of `like`."""
        return self._draw(like).to(like.dtype)

    def _draw(self, like: Tensor) -> Tensor:
        """Numbers inside (0, 1) in float32 or wider, from hashes of consecutive integers."""
        wide = torch.promote_types(like.dtype, torch.float32)
        if not self.training:
            return torch.full_like(like, 0.5, dtype=wide)
        count = like.numel()
        place = torch.arange(1, count + 1, device=like.device) + self.drawn
        self.drawn += count
        z = scramble(self.seed + place * GOLDEN)
        # With 23 bits and a half, float32 holds every value exactly and none is 0 or 1.
        return ((_shift(z, 41).to(wide) + 0.5) * 2.0**-23).view(like.shape)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of the shape, dtype and device of `like` (inverse of erf)."""
        return (math.sqrt(2.0) * torch.erfinv(2.0 * self._draw(like) - 1.0)).to(like.dtype)


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

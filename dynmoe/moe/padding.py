"""Padding: which positions of a batch are real, and how what stands in the others is kept out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError


@dataclass
class Padding:
    """A mask that fits its input. B samples of T positions (image pixels, tokens, or one)."""

    positions: Tensor
    """[B, ...] bool, the real positions, in the shape of the input without its channels"""
    samples: Tensor
    """[B] bool, the samples with a real position"""
    axis: int
    """where the input holds its channels"""

    @classmethod
    def of(cls, mask: Tensor, x: Tensor, axis: int, by_sample: bool) -> Padding:
        """Check a mask against its layer's input x, which holds its channels at `axis`.

        Args:
            mask: False or 0 for padding; bool, whole numbers, or floats that are all 0 or 1.
            by_sample: samples are routed as a whole, so that a mask [B] will do as well.

        Raises:
            UserError: another shape, or floats that are not 0 or 1.
        """
        shape = list(x.shape)
        del shape[axis]
        unknown = mask.is_floating_point() and not torch.compiler.is_compiling()
        if unknown and not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError(
                "a mask of floats must hold 0 for padding and 1 for what is real; for a mask that "
                "is added to attention scores give `mask == 0`"
            )
        mask = (mask != 0).to(x.device)
        if list(mask.shape) == shape:
            positions = mask
        elif by_sample and list(mask.shape) == shape[:1]:
            positions = mask.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        elif len(shape) == 1 and mask.numel() == shape[0]:  # positions that a model has flattened
            positions = mask.flatten()
        else:
            allowed = f"{shape}" + (f" or {shape[:1]}" if by_sample and len(shape) > 1 else "")
            raise UserError(
                f"a mask of shape {list(mask.shape)} does not fit an input of shape "
                f"{list(x.shape)}: it needs one entry per position, {allowed}"
            )
        return cls(
            positions, positions.flatten(1).any(dim=1) if len(shape) > 1 else positions, axis
        )

    def blank(self, x: Tensor) -> Tensor:
        """x or an output of its layer [B, ...] with 0 at the padding."""
        return torch.where(self.positions.unsqueeze(self.axis), x, 0.0)

    def routed(self, by_sample: bool) -> Tensor:
        """[N] bool: which of the rows that are routed are real."""
        return self.samples if by_sample else self.positions.flatten()


def sample_means(x: Tensor, axis: int, padding: Padding | None) -> Tensor:
    """[B, D] mean of samples x over their real positions; 0 where there are none.

    x holds its channels at `axis` and 0 at the padding (None: all is real); [B, D] stays as it is.
    """
    if x.dim() == 2:
        return x
    values = x.movedim(axis, 1).flatten(2)
    if padding is None:
        return values.mean(dim=2) if values.shape[2] else values.sum(dim=2)
    count = padding.positions.flatten(1).sum(dim=1, keepdim=True).clamp(min=1)
    return values.sum(dim=2) / count

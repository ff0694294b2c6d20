"""Craftax's frames from their codes, equal to upstream's pixels and many times as fast.

    renderer = Renderer(classic=False, device="cpu")
    pixels = renderer.uint8(codes)  # [B, 130, 110, 3]

`envs.craftax_code.encoder` makes the codes. On a CPU numba draws them, elsewhere plain torch.
docs/craftax_renderer.md tells how a frame is composed and how this is checked.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from envs.craftax_code import layout
from envs.craftax_textures import tables


class Drawer(Protocol):
    """What a backend provides."""

    def __call__(self, codes: Tensor, out: Tensor, scale: float, shift: float) -> None:
        """Write scale * (0..255) + shift for codes [B, size], B > 0, into out [B, H, W, 3].

        Where `out` is uint8 the values are cut to whole numbers.
        """


class Renderer:
    """Draws frames of one game on one device.

    Args:
        classic: Craftax-Classic instead of Craftax.
        device: where codes are and frames come out.
        backend: "numba" or "torch"; by default numba on a CPU and torch elsewhere.

    Attributes:
        code_size: bytes of a frame's code.
        frame_shape: (H, W, 3) in pixels.

    Raises:
        UserError: the package craftax is not installed.
        ValueError: unknown backend, or codes of another type, shape or device.
    """

    def __init__(
        self, classic: bool, device: torch.device | str, backend: str | None = None
    ) -> None:
        self.device = torch.device(device)
        where = layout(classic)
        self.code_size = where.size
        self.frame_shape = where.frame_shape
        backend = backend or ("numba" if self.device.type == "cpu" else "torch")
        if backend == "numba":
            from envs.craftax_render_numba import NumbaDrawer

            self._draw: Drawer = NumbaDrawer(classic, tables(classic))
        elif backend == "torch":
            from envs.craftax_render_torch import TorchDrawer

            self._draw = TorchDrawer(classic, tables(classic), self.device)
        else:
            raise ValueError(f"unknown backend {backend!r}; known: numba, torch")

    def uint8(self, codes: Tensor) -> Tensor:
        """Frames [B, H, W, 3] in 0..255 of codes [B, code_size] uint8."""
        return self._frames(codes, torch.uint8, 1.0, 0.5)

    def float32(self, codes: Tensor) -> Tensor:
        """Frames [B, H, W, 3] in 0..1 of codes [B, code_size] uint8."""
        return self._frames(codes, torch.float32, 1 / 255, 0.0)

    def _frames(self, codes: Tensor, dtype: torch.dtype, scale: float, shift: float) -> Tensor:
        right = codes.dtype == torch.uint8 and codes.shape[1:] == (self.code_size,)
        if not right or codes.device.type != self.device.type:
            raise ValueError(
                f"codes must be uint8 [B, {self.code_size}] on {self.device}, "
                f"not {codes.dtype} {list(codes.shape)} on {codes.device}"
            )
        out = torch.empty(len(codes), *self.frame_shape, dtype=dtype, device=self.device)
        if len(codes):
            self._draw(codes.contiguous(), out, scale, shift)
        return out

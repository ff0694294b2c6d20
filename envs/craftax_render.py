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

from envs.craftax_code import fields, layout
from envs.craftax_textures import Tables, tables

CHUNK = 512
"""frames drawn at a time, which bounds the memory for what lies between (about 1 GB)"""


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


class TorchDrawer:
    """A `Drawer` in plain torch, for accelerators and any other device."""

    def __init__(self, classic: bool, tables: Tables, device: torch.device) -> None:
        self._layout = layout(classic)
        self._finish = self._classic if classic else self._full
        put = {name: torch.from_numpy(value).to(device) for name, value in tables._asdict().items()}
        row = 3 * self._layout.tile
        self._cells, self._keep, self._paint = (
            put[name][:, :, :row].contiguous() for name in ("cells", "keep", "paint")
        )
        self._start, self._place, self._step = put["start"].long(), put["place"].long(), put["step"]
        self._noise = put["noise"][..., None]
        self._tint = torch.tensor([0.0, 16.0, 64.0], device=device)
        self._dream = torch.tensor([0.0, 0.0, 16.0], device=device)
        self._grey = torch.tensor([0.299, 0.587, 0.114], device=device)

    def __call__(self, codes: Tensor, out: Tensor, scale: float, shift: float) -> None:
        """See `Drawer`."""
        for some, frames in zip(codes.split(CHUNK), out.split(CHUNK), strict=True):
            parts = fields(some, self._layout)
            view, hud = self._compose(parts)
            pixels = torch.cat([self._finish(parts, self._image(view)), self._image(hud)], dim=1)
            frames.copy_(pixels.mul_(scale).add_(shift))

    def _compose(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Map and hud, as cells [B, n, T, T * 3]; the map with its sprites and its light."""
        tiles = parts["tiles"].shape[1]
        hud = self._start.expand(len(parts["tiles"]), -1)
        hud = hud.index_add(1, self._place, parts["hud"].long() * self._step)
        cells = self._cells[torch.cat([parts["tiles"].long(), hud], dim=1)]
        rows = torch.arange(len(cells), device=cells.device)
        player = torch.full_like(parts["cells"][:, :1], tiles // 2)
        places = torch.cat([player, parts["cells"]], dim=1).long()
        seen = places < tiles
        sprites = parts["sprites"].long().where(seen, len(self._keep) - 1)  # the last is nothing
        places = places.where(seen, 0)
        for place, sprite in zip(places.T, sprites.T, strict=True):
            cells[rows, place] = cells[rows, place] * self._keep[sprite] + self._paint[sprite]
        view, below = cells[:, :tiles].float(), cells[:, tiles:].float()
        if "light" in parts:
            view *= parts["light"][:, :, None, None]
        return view, below

    def _image(self, cells: Tensor) -> Tensor:
        """Cells [B, n, T, T * 3] side by side: [B, H, W, 3]."""
        side, columns = self._layout.tile, self._layout.columns
        grid = cells.view(len(cells), -1, columns, side, side, 3).transpose(2, 3)
        return grid.reshape(len(cells), -1, columns * side, 3)

    def _full(self, parts: dict[str, Tensor], view: Tensor) -> Tensor:
        """Night and sleep upon Craftax's map [B, H, W, 3]."""
        day = parts["daylight"][..., None, None]
        blue = 0.5 * (1 - day)
        pixels = view * (day + blue) + blue * self._tint
        dark, mask, noise = self._night(parts)
        pixels[dark] += blue[dark] * mask * (noise - view[dark])
        return pixels * (1 - 0.5 * parts["asleep"][..., None, None])

    def _classic(self, parts: dict[str, Tensor], view: Tensor) -> Tensor:
        """Night and sleep upon Classic's map [B, H, W, 3]."""
        day = parts["daylight"][..., None, None]
        dark, mask, noise = self._night(parts)
        night = view.clone()
        night[dark] += mask * (noise - view[dark])
        night = 0.4 * night + 0.6 * self._luminance(night)
        pixels = day * view + (1 - day) * 0.5 * (night + self._tint)
        asleep = parts["asleep"][..., None, None]
        dream = 0.5 * (self._luminance(pixels) + self._dream)
        return pixels * (1 - asleep) + asleep * dream

    def _luminance(self, pixels: Tensor) -> Tensor:
        return (pixels * self._grey).sum(dim=-1, keepdim=True)

    def _night(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Which frames [n] have noise; its strength and value there, each [n, H, W, 1]."""
        day = parts["daylight"][:, 0]
        dark = (day < 0.5).nonzero().squeeze(1)
        mask = (1 - 2 * day[dark])[:, None, None, None] * self._noise
        return dark, mask, 32 + 95 * uniform(parts["key"][dark], self._noise.numel()).view_as(mask)


def uniform(keys: Tensor, count: int) -> Tensor:
    """[n, count] floats in 0..1 as jax.random.uniform(key, (count,)) draws them; keys [n, 2] int32.

    Threefry-2x32 with 20 rounds (Salmon et al., 2011) of the counter (0, i), both words xored, as
    JAX does with jax_threefry_partitionable. int32 sums wrap around like those of uint32.
    """
    first, second = keys[:, :1], keys[:, 1:]
    schedule = (first, second, first ^ second ^ 0x1BD11BDA)
    a = first
    b = torch.arange(count, dtype=torch.int32, device=keys.device) + second
    for group in range(5):
        for by in (13, 15, 26, 6) if group % 2 == 0 else (17, 29, 16, 24):
            a = a + b
            b = ((b << by) | ((b >> (32 - by)) & ((1 << by) - 1))) ^ a
        a = a + schedule[(group + 1) % 3]
        b = b + (schedule[(group + 2) % 3] + group + 1)
    return (((a ^ b) >> 9) & 0x7FFFFF).float() * 2.0**-23

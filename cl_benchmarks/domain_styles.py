"""Ways to draw a gray image: what makes the embedded domains differ.

A style takes gray images [N, S, S] in 0 .. 1, bright shapes on black, and returns colours
[N, 3, S, S] in 0 .. 1. Per-image choices come from the generator. All of it is ours; the domains
are to differ in look and to keep the shapes, as photo, cartoon and sketch do in PACS.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Style = Callable[[Tensor, torch.Generator], Tensor]


def plain(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White on black."""
    return gray[:, None].expand(-1, 3, -1, -1)


def coloured(gray: Tensor, generator: torch.Generator) -> Tensor:
    """A random colour on a darker one, at least 0.4 apart in brightness."""
    count = len(gray)
    colours = torch.rand(2, count, 3, 1, 1, generator=generator)
    light = colours.mean(dim=2, keepdim=True)
    swap = light[0] < light[1]
    front, back = (torch.where(swap, colours[1 - i], colours[i]) for i in (0, 1))
    # Pushing the two apart in brightness keeps the shape visible in gray values too.
    push = (0.4 - (light[0] - light[1]).abs()).clamp(min=0) / 2
    front, back = (front + push).clamp(0, 1), (back - push).clamp(0, 1)
    return back + (front - back) * gray[:, None]


def textured(gray: Tensor, generator: torch.Generator) -> Tensor:
    """The shape shows through as a change of one grating into another, finer one."""
    front = _grating(gray, 0.25, 0.35, generator)
    back = _grating(gray, 0.06, 0.12, generator)
    mask = (gray > 0.25).float()
    values = mask * (0.45 + 0.55 * front) + (1 - mask) * 0.45 * back
    tint = 0.6 + 0.4 * torch.rand(len(gray), 3, 1, 1, generator=generator)
    return values[:, None] * tint


def noisy(gray: Tensor, generator: torch.Generator) -> Tensor:
    """Half the contrast, under Gaussian noise of deviation 0.2 in each channel."""
    noise = torch.randn(len(gray), 3, *gray.shape[1:], generator=generator)
    return (0.25 + 0.5 * gray[:, None] + 0.2 * noise).clamp(0, 1)


def edges(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White outlines on black: the length of the gradient (Sobel), as chalk would draw them."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    both = torch.stack([kernel, kernel.T])[:, None]
    slopes = F.conv2d(F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate"), both)
    length = slopes.square().sum(dim=1, keepdim=True).sqrt()
    peak = length.amax(dim=(2, 3), keepdim=True).clamp(min=0.01)
    return (length / peak).expand(-1, 3, -1, -1)


def rotated(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White on black, turned by 45 to 135 degrees to either side."""
    turn = math.pi / 4 * (1 + 2 * torch.rand(len(gray), generator=generator))
    turn = turn * torch.where(torch.rand(len(gray), generator=generator) < 0.5, 1.0, -1.0)
    zero = torch.zeros_like(turn)
    rows = [torch.stack([turn.cos(), -turn.sin(), zero], 1),
            torch.stack([turn.sin(), turn.cos(), zero], 1)]  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1), [len(gray), 1, *gray.shape[1:]], False)
    return F.grid_sample(gray[:, None], grid, align_corners=False).expand(-1, 3, -1, -1)


def blocky(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White on black, in pixels of three times the size."""
    small = F.interpolate(gray[:, None], size=-(-gray.shape[-1] // 3), mode="area")
    return F.interpolate(small, size=gray.shape[1:], mode="nearest").expand(-1, 3, -1, -1)


STYLES: dict[str, Style] = {
    "plain": plain,
    "coloured": coloured,
    "textured": textured,
    "noisy": noisy,
    "edges": edges,
    "rotated": rotated,
    "blocky": blocky,
}
"""Name of an embedded domain -> how its images are drawn."""


def draw(gray: Tensor, style: str, generator: torch.Generator) -> Tensor:
    """Images in a style: uint8 [N, S, S] -> uint8 [N, 3, S, S]."""
    values = STYLES[style](gray.float() / 255, generator)
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def _grating(gray: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Waves [N, S, S] in 0 .. 1 of random direction and phase, low .. high per pixel."""
    count, size = gray.shape[:2]
    draws = torch.rand(3, count, 1, 1, generator=generator)
    angle, phase = math.pi * draws[0], 2 * math.pi * draws[1]
    frequency = 2 * math.pi * (low + (high - low) * draws[2])
    place = torch.arange(size, dtype=torch.float32)
    along = angle.cos() * place + angle.sin() * place[:, None]
    return 0.5 + 0.5 * torch.sin(frequency * along + phase)

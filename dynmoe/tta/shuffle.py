"""Images whose shape is destroyed while their colours stay: what DeYO compares with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Destruction = Literal["patch", "pixel", "occlusion"]


def shuffle_patches(images: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] cut into grid x grid patches, in a random order of each image's own.

    Sides that the grid does not divide are resized (bilinear, antialiased) to ones that it does,
    and back. Orders are the ranks of uniform float32 noise [B, grid^2] of a CPU generator.
    """
    height, width = images.shape[-2:]
    size = (height // grid * grid, width // grid * grid)
    pieces = _resize(images, size)
    b, c = pieces.shape[:2]
    rows, columns = size[0] // grid, size[1] // grid
    pieces = pieces.view(b, c, grid, rows, grid, columns).permute(0, 2, 4, 1, 3, 5)
    noise = torch.rand(b, grid * grid, generator=generator, dtype=torch.float32)
    order = noise.argsort(dim=1).to(images.device)
    flat = pieces.reshape(b, grid * grid, c, rows, columns)
    mixed = flat[torch.arange(b, device=images.device).unsqueeze(1), order]
    mixed = mixed.view(b, grid, grid, c, rows, columns).permute(0, 3, 1, 4, 2, 5)
    return _resize(mixed.reshape(b, c, *size), (height, width))


def shuffle_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] with their pixels in one random order, the same for all."""
    order = torch.randperm(images.shape[-2:].numel(), generator=generator).to(images.device)
    return images.flatten(2)[:, :, order].view_as(images)


def occlude(images: Tensor, share: float) -> Tensor:
    """Images [B, C, H, W] whose central `share` of either side has each channel's mean."""
    height, width = images.shape[-2:]
    rows, columns = round(height * share), round(width * share)
    top, left = (height - rows) // 2, (width - columns) // 2
    hidden = images.clone()
    means = images.mean(dim=(2, 3), keepdim=True)
    hidden[:, :, top : top + rows, left : left + columns] = means
    return hidden


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)

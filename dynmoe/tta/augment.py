"""CoTTA's random augmentation of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.errors import UserError


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of a batch [B, C, H, W], drawn once for all its images.

    Wang et al. 2022 (arXiv 2203.13591) and its code: clip to [0, 1]; brightness 0.6-1.4, contrast
    0.7-1.3, saturation 0.5-1.5, hue +-0.06 and gamma 0.7-1.3, in a random order; a margin of half
    the side, repeating the edge; rotation by +-15 degrees, shift by 1/16, scale 0.9-1.1 (bilinear,
    ours); Gaussian blur of 5 pixels and sigma 0.001-0.5; the centre; a flip with chance 1/2; noise
    of 0.005; clip. Images that are normalised already are clipped all the same, as there.

    Raises:
        UserError: images with neither 1 nor 3 channels.
    """
    from torchvision.transforms.v2 import functional as transform

    channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise UserError(f"cotta augments images of 1 or 3 channels, not {channels}")

    def draw(low: float, high: float) -> float:
        share = torch.rand((), generator=generator, device=generator.device)
        return low + (high - low) * float(share)

    x = _colour(images.clamp(0, 1), draw, generator)
    x = transform.pad(x, [width // 2, height // 2], padding_mode="edge")
    x = transform.affine(
        x,
        angle=draw(-15, 15),
        translate=[draw(-1, 1) * x.shape[-1] / 16, draw(-1, 1) * x.shape[-2] / 16],
        scale=draw(0.9, 1.1),
        shear=[0.0, 0.0],
        interpolation=transform.InterpolationMode.BILINEAR,
    )
    x = transform.gaussian_blur(x, [5, 5], [draw(0.001, 0.5)] * 2)
    x = transform.center_crop(x, [height, width])
    x = x.flip(-1) if draw(0, 1) < 0.5 else x
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + 0.005 * noise).clamp(0, 1)


def _colour(x: Tensor, draw: object, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation, hue and gamma of images in [0, 1], in a random order."""
    from torchvision.transforms.v2 import functional as transform

    steps = [
        (transform.adjust_brightness, 0.6, 1.4),
        (transform.adjust_contrast, 0.7, 1.3),
        (transform.adjust_saturation, 0.5, 1.5),
        (transform.adjust_hue, -0.06, 0.06),
        (transform.adjust_gamma, 0.7, 1.3),
    ]
    for index in torch.randperm(5, generator=generator, device=generator.device).tolist():
        change, low, high = steps[index]
        x = change(x, draw(low, high)).clamp(0, 1)  # type: ignore[operator]
    return x

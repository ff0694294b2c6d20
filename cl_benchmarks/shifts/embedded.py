"""Shifted fractals: the embedded stand-in for ImageNet-C, -R, -Sketch and -A.

Clean images are fractals in "middle" views (`cl_benchmarks.fractals`), gray as RGB.

ImageNet-C's corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261) are made for 224 pixels;
a defocus radius of ten pixels leaves nothing of an image of 32. Here each of the 15 names stands
for the same idea at a strength that suits 32 pixels, in torch alone. All formulas and constants are
ours: numbers found on these images say nothing about ImageNet-C.

The stand-ins for the other sets are ours, too: rendition paints the fractal in a colour on a
coloured ground, sketch keeps its outlines, dark on white, and adversarial shows it in "hard" views,
from which a network that knows the middle ones errs most.

Shapes: images uint8 `[N, 3, S, S]`; while they are corrupted, float32 in 0 .. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cl_benchmarks import fractals
from cl_benchmarks.images import check_least
from cl_benchmarks.shifts.domain import Domain, Memory, check
from cl_benchmarks.shifts.stream import OTHERS, ShiftSource
from dynmoe import seeding
from dynmoe.errors import UserError, unknown
from dynmoe.lab import cache

BLOCK = 1000
"""Images corrupted together; keeps the float copies small."""
VERSION = 1
"""Raise it when the same arguments give other pixels: cached images are then made again."""
SEED = 0
"""The embedded images are one fixed data set, as a downloaded one is."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """Options of the embedded images."""

    classes: int = 20
    """how many of the 200 fractal systems, 2 to 200"""
    size: int = 32
    """image side in pixels, 16 to 256"""
    train_per_class: int = 500
    """clean images of each class that the source model learns"""
    test_per_class: int = 12
    """images of each class in every domain"""


class Embedded(ShiftSource):
    """The embedded images.

    Args:
        config: sizes.

    Raises:
        UserError: a size that cannot work.
    """

    def __init__(self, config: EmbeddedConfig) -> None:
        check_least("embedded", config, train_per_class=1, test_per_class=1)
        if config.classes < 2:
            raise UserError(f"embedded classes {config.classes} is too small; use 2 to 200")
        if config.size < 16:
            raise UserError(f"embedded size {config.size} is too small; use 16 to 256")
        fractals.check(range(config.classes), config.size, "middle", SEED)
        self.config, self.name = config, f"shifted fractals {config.size}"
        self.num_classes, self.size = config.classes, config.size
        self.mean, self.std = (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)
        self._labels = torch.arange(config.classes).repeat_interleave(config.test_per_class)

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Clean images uint8 `[N, 3, S, S]` and labels int64 [N] for the source model."""
        c = self.config
        images = self._rendered("middle", "train", c.train_per_class)
        return images, torch.arange(c.classes).repeat_interleave(c.train_per_class)

    def corrupted(self, corruption: str, severity: int) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: unknown corruption or severity, or one of the four extra ones.
        """
        check(corruption, severity)
        key = cache.digest({
            "version": VERSION, "fractals": fractals.VERSION, "seed": SEED,
            "classes": self.config.classes, "per_class": self.config.test_per_class,
            "size": self.size, "corruption": corruption, "severity": severity,
        })  # fmt: skip

        def make() -> cache.Arrays:
            made = corrupt(self._clean(), corruption, severity, SEED)
            return {"images": made.numpy()}

        images = cache.load_or_make(f"shifted-fractals-{key}", make)["images"]
        return Memory(corruption, torch.from_numpy(images), self._labels)

    def other(self, shift: str) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: there is no such shift.
        """
        if shift == "clean":
            images = self._clean()
        elif shift == "rendition":
            images = _rendition(self._clean())
        elif shift == "sketch":
            images = _sketch(self._clean())
        elif shift == "adversarial":
            images = self._rendered("hard", "test", self.config.test_per_class)
        else:
            raise unknown("shift", shift, (*OTHERS, "clean"))
        return Memory(shift, images, self._labels)

    def _clean(self) -> Tensor:
        return self._rendered("middle", "test", self.config.test_per_class)

    def _rendered(self, views: fractals.ViewName, split: fractals.Split, each: int) -> Tensor:
        c = self.config
        gray = fractals.render_cached(c.classes, each, c.size, views, SEED, split)
        return gray.expand(-1, 3, -1, -1)


def _rendition(images: Tensor) -> Tensor:
    """Each image between two random colours: a dark ground, a bright figure."""
    g = seeding.generator(SEED, "rendition")
    ground = torch.rand((len(images), 3, 1, 1), generator=g) * 0.5
    figure = 0.5 + torch.rand((len(images), 3, 1, 1), generator=g) * 0.5
    x = images.float() / 255
    return ((ground + (figure - ground) * x) * 255).round().to(torch.uint8)


def _sketch(images: Tensor) -> Tensor:
    """Outlines by Sobel's gradient, half as dark as they could be, on white."""
    x = images[:, :1].float() / 255
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernel = torch.stack([across, across.T])[:, None]
    edges = F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), kernel).norm(dim=1, keepdim=True)
    paper = 1 - 0.5 * edges.clamp(0, 1)
    return (paper * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def corrupt(images: Tensor, corruption: str, severity: int, seed: int) -> Tensor:
    """Images uint8 `[N, 3, S, S]`, each corrupted in a way of its own; the same for the same seed.

    Raises:
        UserError: an unknown corruption or severity, or one of the four extra ones.
    """
    check(corruption, severity)
    if corruption not in KINDS:
        raise UserError(
            f"corruption {corruption!r} has no 32-pixel version; known: {', '.join(KINDS)}"
        )
    generator = seeding.generator(seed, corruption, severity)
    out = []
    for block in images.split(BLOCK):
        x = KINDS[corruption](block.float() / 255, severity - 1, generator)
        out.append((x.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(out)


def _gaussian_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    sigma = (0.08, 0.12, 0.18, 0.24, 0.32)[s]
    return x + sigma * torch.randn(x.shape, generator=g)


def _shot_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    photons = (60, 30, 16, 9, 5)[s]
    return torch.poisson(x * photons, generator=g) / photons + torch.poisson(
        torch.full_like(x, 0.5), generator=g
    ) / (2 * photons)  # dark current, else black stays black


def _impulse_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    share = (0.03, 0.06, 0.1, 0.16, 0.24)[s]
    hit = torch.rand(x.shape, generator=g) < share
    return torch.where(hit, (torch.rand(x.shape, generator=g) < 0.5).float(), x)


def _defocus_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    radius = (0.8, 1.1, 1.5, 1.9, 2.4)[s]
    steps = torch.arange(-3, 4).float()
    distance = (steps[:, None] ** 2 + steps[None] ** 2).sqrt()
    return _convolve(x, (radius + 0.5 - distance).clamp(0, 1))


def _glass_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    reach = (0.5, 0.8, 1.1, 1.4, 1.8)[s]
    size = x.shape[-1]
    offsets = (torch.rand((len(x), 2, size, size), generator=g) * 2 - 1) * reach
    return _blur(_displace(x, offsets), 0.5)


def _motion_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    length = (2, 3, 4, 5, 7)[s]
    angle = torch.rand(len(x), generator=g) * math.pi
    direction = torch.stack([angle.sin(), angle.cos()], dim=1)[:, :, None, None]
    size = x.shape[-1]
    shifts = torch.linspace(-length / 2, length / 2, 2 * length + 1)
    moved = [_displace(x, (t * direction).expand(-1, -1, size, size)) for t in shifts]
    return torch.stack(moved).mean(0)


def _zoom_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    largest = (0.1, 0.16, 0.24, 0.32, 0.42)[s]
    size = x.shape[-1]
    steps = torch.arange(size) - (size - 1) / 2
    outward = torch.stack(torch.meshgrid(steps, steps, indexing="ij"))[None].expand(
        len(x), -1, -1, -1
    )
    zooms = torch.linspace(0, largest, 6)
    return torch.stack([_displace(x, outward * (1 / (1 + z) - 1)) for z in zooms]).mean(0)


def _snow(x: Tensor, s: int, g: Generator) -> Tensor:
    flakes, whitening = ((0.005, 0.1), (0.01, 0.15), (0.015, 0.2), (0.02, 0.25), (0.03, 0.3))[s]
    layer = (torch.rand((len(x), 1, *x.shape[2:]), generator=g) < flakes).float()
    streak = torch.zeros(5, 5)
    streak[range(5), range(5)] = torch.tensor([0.4, 0.7, 1.0, 0.7, 0.4])
    fallen = F.conv2d(layer, streak[None, None], padding=2)
    return x * (1 - whitening) + whitening + fallen


def _frost(x: Tensor, s: int, g: Generator) -> Tensor:
    kept, strength = ((0.9, 0.25), (0.85, 0.35), (0.8, 0.45), (0.75, 0.55), (0.7, 0.65))[s]
    crystals = (_clouds(x, (4, 8, 16), g) * 2 - 0.8).clamp(0, 1)
    tint = torch.tensor([0.85, 0.95, 1.0])[None, :, None, None]
    return kept * x + strength * crystals * tint


def _fog(x: Tensor, s: int, g: Generator) -> Tensor:
    strength = (0.3, 0.5, 0.7, 1.0, 1.4)[s]
    return (x + strength * _clouds(x, (2, 4, 8), g)) / (1 + strength)


def _brightness(x: Tensor, s: int, g: Generator) -> Tensor:
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[s]


def _contrast(x: Tensor, s: int, g: Generator) -> Tensor:
    factor = (0.6, 0.45, 0.3, 0.2, 0.12)[s]
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic_transform(x: Tensor, s: int, g: Generator) -> Tensor:
    reach = (1.5, 2.2, 3.0, 3.8, 4.6)[s]
    coarse = torch.rand((len(x), 2, 5, 5), generator=g) * 2 - 1
    return _displace(x, reach * F.interpolate(coarse, x.shape[2:], mode="bicubic"))


def _pixelate(x: Tensor, s: int, g: Generator) -> Tensor:
    size = round(x.shape[-1] * (0.75, 0.6, 0.5, 0.4, 0.3)[s])
    return F.interpolate(F.interpolate(x, (size, size), mode="area"), x.shape[2:], mode="nearest")


def _jpeg_compression(x: Tensor, s: int, g: Generator) -> Tensor:
    """JPEG's loss: the cosine coefficients of 8x8 blocks, rounded; high frequencies coarser."""
    step = (0.15, 0.25, 0.35, 0.5, 0.7)[s]
    n, c, height, width = x.shape
    padded = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    k = torch.arange(8).float()
    dct = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) / 2
    dct[0] /= math.sqrt(2)
    rows, columns = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.view(n, c, rows, 8, columns, 8).transpose(3, 4)
    table = step * (1 + k[:, None] + k[None]) / 2
    rounded = ((dct @ blocks @ dct.T) / table).round() * table
    back = (dct.T @ rounded @ dct).transpose(3, 4).reshape(padded.shape)
    return back[:, :, :height, :width]


KINDS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise, "defocus_blur": _defocus_blur, "glass_blur": _glass_blur,
    "motion_blur": _motion_blur, "zoom_blur": _zoom_blur, "snow": _snow, "frost": _frost,
    "fog": _fog, "brightness": _brightness, "contrast": _contrast,
    "elastic_transform": _elastic_transform, "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}  # fmt: skip
"""(x `[N, 3, S, S]`, severity 0 .. 4, generator) -> corrupted x."""


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with a kernel [k, k] that is scaled to sum 1; borders repeated."""
    kernel = (kernel / kernel.sum())[None, None].expand(x.shape[1], 1, -1, -1)
    reach = kernel.shape[-1] // 2
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=x.shape[1])


def _blur(x: Tensor, sigma: float) -> Tensor:
    steps = torch.arange(-3, 4).float()
    line = torch.exp(-(steps**2) / (2 * sigma**2))
    return _convolve(x, line[:, None] * line[None])


def _displace(x: Tensor, offsets: Tensor) -> Tensor:
    """Read each pixel `offsets` `[N, 2 (rows, columns), S, S]` pixels away, bilinearly."""
    size = x.shape[-1]
    steps = torch.arange(size).float()
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    grid = torch.stack([columns + offsets[:, 1], rows + offsets[:, 0]], dim=-1)
    grid = (grid + 0.5) * 2 / size - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _clouds(x: Tensor, scales: tuple[int, ...], g: Generator) -> Tensor:
    """Smooth random fields `[N, 1, S, S]` in 0 .. 1: noise of several scales, finer ones weaker."""
    field = torch.zeros(len(x), 1, *x.shape[2:])
    for octave, cells in enumerate(scales):
        noise = torch.rand((len(x), 1, cells, cells), generator=g)
        field += F.interpolate(noise, x.shape[2:], mode="bilinear") / 2**octave
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - low) / (high - low).clamp_min(1e-6)

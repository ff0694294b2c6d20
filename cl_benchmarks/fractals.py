"""Gray images of iterated function systems (IFS): the embedded stand-in for a real data set.

A class is one IFS; an image is its attractor, drawn after a random change of one parameter and a
random view. The idea, the change of one parameter over all maps and the min-max frame are those of
FractalDB (Kataoka et al., ACCV 2020). The systems are sampled as by Anderson & Farrell, "Improving
Fractal Pre-training" (WACV 2022, arXiv 2110.03091), from singular values: every map contracts, so
nothing diverges. The 200 systems lie in `data/fractal_ifs.npz`, which

    python -m cl_benchmarks.fractals --make-table

writes again. Our choices: 32 points of the chaos game move side by side, the gray level is the
logarithm of the hits, and the jitter is drawn from an interval instead of FractalDB's four values.

Shapes: M maps, B images of one class rendered together, P = CHAINS points, S pixels a side.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.lab import cache

NUM_CLASSES = 200
MAX_MAPS = 8
CHAINS = 32
BURN_IN = 16
"""Steps not drawn. A map shrinks distances to under .6 on average: .6^16 is far below a pixel."""
BLOCK = 128
"""Images rendered together; more would fall out of the processor's cache."""
MAX_STRETCH = 0.98
"""Largest singular value a map may have after its parameter was changed."""
FILL = 0.9
"""Side of the attractor's frame, in image sides, before zoom."""
TABLE = Path(__file__).parent / "data" / "fractal_ifs.npz"
TABLE_SEED = 2026
VERSION = 1
"""Raise it when the same arguments give other pixels: cached images are then rendered again."""

Split = Literal["train", "test"]
ViewName = Literal["easy", "middle", "hard"]


@dataclass(frozen=True)
class Views:
    """How much the images of a class differ. All draws are uniform."""

    jitter: float
    """d: one parameter of the system is multiplied, in all maps, by 1-2d .. 1+2d"""
    degrees: float = 0.0
    """rotation, -degrees .. degrees"""
    zoom: float = 0.0
    """size, 1-zoom .. 1+zoom"""
    shift: float = 0.0
    """shift in x and in y, in image sides"""
    flips: bool = False
    """mirror left-right and up-down, each for half of the images"""


VIEWS: dict[str, Views] = {
    "easy": Views(jitter=0.2, flips=True),
    "middle": Views(jitter=0.2, degrees=20, zoom=0.2, shift=0.1),
    "hard": Views(jitter=0.4, degrees=180, zoom=0.4, shift=0.15),
}


def render(
    classes: Sequence[int], per_class: int, size: int, views: ViewName, seed: int, split: Split
) -> Tensor:
    """Images of some classes, class by class in the order given.

    Each class has a random stream of its own, decided by (seed, class, split): classes can be
    rendered alone and in any order, and the first n of `per_class` images do not depend on
    `per_class`. Bit-equal on one machine; another one may round a point into the next pixel.

    Returns:
        uint8 `[len(classes) * per_class, 1, size, size]`, 0 where no point fell.

    Raises:
        UserError: a class that the table does not hold, an unknown view, a negative seed.
    """
    check(classes, size, views, seed)
    table = load_table()
    images = np.empty((len(classes), per_class, size, size), dtype=np.uint8)
    for row, label in enumerate(classes):
        rng = np.random.default_rng([seed, label, ("train", "test").index(split)])
        _render_class(table[label], images[row], VIEWS[views], rng)
    return torch.from_numpy(images.reshape(-1, 1, size, size))


def render_cached(
    num_classes: int, per_class: int, size: int, views: ViewName, seed: int, split: Split
) -> Tensor:
    """`render` of the first classes, uint8 [num_classes * per_class, 1, size, size].

    Cached under a digest of the arguments, table and version.
    """
    check(range(num_classes), size, views, seed)
    table = hashlib.sha256(TABLE.read_bytes()).hexdigest()
    key = cache.digest({
        "version": VERSION, "table": table, "views": asdict(VIEWS[views]),
        "classes": num_classes, "per_class": per_class, "size": size, "seed": seed, "split": split,
    })  # fmt: skip

    def make() -> cache.Arrays:
        images = render(range(num_classes), per_class, size, views, seed, split)
        return {"images": images.numpy()}

    return torch.from_numpy(cache.load_or_make(f"fractal-{key}", make)["images"])


def check(classes: Sequence[int], size: int, views: str, seed: int) -> None:
    """Refuse arguments that `render` cannot take.

    Raises:
        UserError: a class, size, view or seed that there is not.
    """
    bad = [c for c in classes if not 0 <= c < NUM_CLASSES]
    if bad:
        raise UserError(
            f"fractal class {bad[0]} does not exist: there are {NUM_CLASSES}, "
            f"0 to {NUM_CLASSES - 1}; use at most {NUM_CLASSES} classes"
        )
    if not 8 <= size <= 256:
        raise UserError(f"fractal size {size} is out of range; use 8 to 256 pixels")
    if views not in VIEWS:
        raise UserError(f"unknown fractal views {views!r}; use one of {', '.join(VIEWS)}")
    if seed < 0:
        raise UserError(f"seed {seed} is negative; use 0 or more")


def points_per_image(size: int) -> int:
    """Points drawn per image: about 3,000 at 32 pixels and 6,000 at 64, a multiple of CHAINS."""
    return 96 * size // CHAINS * CHAINS


@functools.cache
def load_table() -> tuple[np.ndarray, ...]:
    """The packaged systems, each float64 `[M, 6]`: a map takes (x, y) to (ax+by+e, cx+dy+f)."""
    with np.load(TABLE) as file:
        maps, counts = file["maps"].astype(np.float64), file["counts"]
    return tuple(maps[i, :m] for i, m in enumerate(counts))


def _render_class(
    maps: np.ndarray, out: np.ndarray, views: Views, rng: np.random.Generator
) -> None:
    """Fill `out` uint8 `[n, S, S]` with images of one system `[M, 6]`."""
    size = out.shape[-1]
    steps = BURN_IN + points_per_image(size) // CHAINS
    # All images of the class share the sequence of maps (so does FractalDB): they then differ by
    # their parameters and views alone, and one step is a few array operations for all of them.
    sequence = rng.choice(len(maps), size=(steps, CHAINS), p=_weights(maps))
    draws = rng.random((len(out), 8))
    for start in range(0, len(out), BLOCK):
        part = draws[start : start + BLOCK]
        x, y = _orbits(_jittered(maps, part, views.jitter), sequence)
        u, v = _viewed(x, y, part, views, size)
        out[start : start + BLOCK] = _shaded(_histogram(u, v, size))


def _weights(maps: np.ndarray) -> np.ndarray:
    """Probability of each map, `[M]`: its share of |ad - bc|, as FractalDB's."""
    area = np.abs(maps[:, 0] * maps[:, 3] - maps[:, 1] * maps[:, 2]) + 1e-6
    return area / area.sum()


def _jittered(maps: np.ndarray, draws: np.ndarray, jitter: float) -> np.ndarray:
    """One system per image, float32 `[6, M, B]`: one parameter changed, maps kept contracting."""
    factor = np.ones((6, len(draws)))
    which = (draws[:, 0] * 6).astype(int)
    factor[which, np.arange(len(draws))] = 1 + 2 * jitter * (2 * draws[:, 1] - 1)
    changed = maps.T[:, :, None] * factor[:, None, :]
    changed[:4] *= np.minimum(1, MAX_STRETCH / np.maximum(_stretch(changed), 1e-12))
    return changed.astype(np.float32)


def _stretch(maps: np.ndarray) -> np.ndarray:
    """Largest singular value of each 2x2 part, for parameters `[6, ...]`, in closed form."""
    a, b, c, d = maps[:4]
    total, area = a * a + b * b + c * c + d * d, a * d - b * c
    return np.sqrt((total + np.sqrt(np.maximum(total * total - 4 * area * area, 0))) / 2)


def _orbits(maps: np.ndarray, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chaos game for systems `[6, M, B]`: coordinates x and y, float32 `[T * P, B]` each."""
    width = maps.shape[2]
    steps = len(sequence) - BURN_IN
    xs = np.empty((steps, CHAINS, width), dtype=np.float32)
    ys = np.empty_like(xs)
    x, y, p, q = np.zeros((4, CHAINS, width), dtype=np.float32)
    k = np.empty((6, CHAINS, width), dtype=np.float32)
    for t, chosen in enumerate(sequence):
        for i in range(6):  # mode="clip" lets numpy write into k without a copy
            np.take(maps[i], chosen, axis=0, out=k[i], mode="clip")
        np.multiply(k[0], x, out=p)
        np.multiply(k[1], y, out=q)
        p += q
        p += k[4]
        np.multiply(k[2], x, out=q)
        np.multiply(k[3], y, out=y)
        q += y
        q += k[5]
        x, y, p, q = p, q, x, y
        if t >= BURN_IN:
            xs[t - BURN_IN], ys[t - BURN_IN] = x, y
    return xs.reshape(-1, width), ys.reshape(-1, width)


def _viewed(
    x: np.ndarray, y: np.ndarray, draws: np.ndarray, views: Views, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates `[T * P, B]`, float32: min-max frame, then flip, rotate, zoom and shift."""
    low, high = np.stack([x.min(0), y.min(0)]), np.stack([x.max(0), y.max(0)])  # [2, B]
    middle, extent = (low + high) / 2, np.maximum(high - low, 1e-6)
    signed = (2 * draws - 1).T  # [8, B], each in -1 .. 1
    angle = np.deg2rad(views.degrees) * signed[2]
    zoom = FILL * (1 + views.zoom * signed[3])
    mirror = np.sign(signed[6:8]) if views.flips else np.ones_like(extent)
    scale = size * zoom * mirror / extent  # [2, B], per axis of the attractor
    cos, sin = np.cos(angle), np.sin(angle)
    rows = []
    for kx, ky, shift in ((cos, -sin, signed[4]), (sin, cos, signed[5])):
        kx, ky = kx * scale[0], ky * scale[1]
        offset = size * (0.5 + views.shift * shift) - kx * middle[0] - ky * middle[1]
        pixel = x * kx.astype(np.float32)
        pixel += y * ky.astype(np.float32)
        pixel += offset.astype(np.float32)
        rows.append(pixel)
    return rows[0], rows[1]


def _histogram(u: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """Hits per pixel, int64 `[B, S, S]`, of points at u (column) and v (row); outside ones drop."""
    side = size + 2  # a rim of one pixel takes the points outside
    column = (np.clip(u, -1, size, out=u) + 1).astype(np.int32)
    index = (np.clip(v, -1, size, out=v) + 1).astype(np.int32)
    index *= side
    index += column
    index += np.arange(u.shape[1], dtype=np.int32) * (side * side)
    hits = np.bincount(index.ravel(), minlength=u.shape[1] * side * side)
    return hits.reshape(-1, side, side)[:, 1:-1, 1:-1]


def _shaded(hits: np.ndarray) -> np.ndarray:
    """Gray levels uint8 `[B, S, S]`: log(1 + hits), scaled so that an image's maximum is 255."""
    gray = np.log1p(hits.astype(np.float32))
    gray *= 255 / np.maximum(gray.max(axis=(1, 2), keepdims=True), 1e-6)
    return np.rint(gray).astype(np.uint8)


def sample_system(label: int) -> np.ndarray:
    """Draw the system of one class, float32 `[M, 6]`, M in 2 .. 8; deterministic.

    2110.03091, section 3: each 2x2 part is R(theta) diag(s1, s2) R(phi) diag(+-1, +-1) with
    1 > s1 > s2 > 0, and the systems whose sum over maps of s1 + 2 s2 lies in
    (5 + M)/2 .. (6 + M)/2 look best; translations are uniform in -1 .. 1. We reject where the paper
    samples under the constraint, and also those that hit less than a fifth of 64 x 64 cells
    (FractalDB's filling rate), which would be lines.
    """
    rng = np.random.default_rng([TABLE_SEED, label])
    count = int(rng.integers(2, MAX_MAPS + 1))
    while True:
        s = np.sort(rng.random((count, 2)), axis=1)[:, ::-1]
        if not (5 + count) / 2 <= float(s[:, 0].sum() + 2 * s[:, 1].sum()) <= (6 + count) / 2:
            continue
        theta, phi = rng.uniform(0, 2 * np.pi, (2, count))
        sign = rng.choice([-1.0, 1.0], (count, 2))
        linear = _rotation(theta) @ (s[:, :, None] * _rotation(phi)) * sign[:, None, :]
        maps = np.concatenate([linear.reshape(count, 4), rng.uniform(-1, 1, (count, 2))], axis=1)
        image = np.empty((1, 64, 64), dtype=np.uint8)
        _render_class(maps, image, Views(jitter=0.0), np.random.default_rng(0))
        if (image > 0).mean() >= 0.2:
            return maps.astype(np.float32)


def _rotation(angle: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def make_table(path: Path = TABLE) -> None:
    """Write all systems: `maps` float32 `[200, 8, 6]`, zero after the `counts` int8 `[200]`."""
    maps, counts = np.zeros((NUM_CLASSES, MAX_MAPS, 6), np.float32), np.zeros(NUM_CLASSES, np.int8)
    for label in range(NUM_CLASSES):
        system = sample_system(label)
        counts[label], maps[label, : len(system)] = len(system), system
    cache.write_npz(path, {"maps": maps, "counts": counts}, compress=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["--make-table"]:
        sys.exit("usage: python -m cl_benchmarks.fractals --make-table")
    make_table()
    print(f"{TABLE.name}: {NUM_CLASSES} systems, {TABLE.stat().st_size} bytes")

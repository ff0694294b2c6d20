"""Chunks as batches straight from tensors in memory, and as a benchmark for Avalanche's strategies.

`Batches` come in an order that can be resumed anywhere: the order and the augmentation of an epoch
depend on (seed, task, epoch) and, for augmentation, on the batch; nothing has to be saved to go on
in the middle of an epoch. Avalanche 0.6 reads items one by one; a loader of ours can instead take
all tensors of an experience at once from `chunk_of(experience)`. Importing Avalanche costs seconds,
so it happens inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from cl_benchmarks.images import ImageData, channel_stats
from cl_benchmarks.protocol import Chunk
from cl_benchmarks.styles import restyle
from dynmoe import seeding

Augment = Literal["none", "crop-flip"]
CROP_PADDING = 4
"""pixels of zero padding around an image before a random crop of its own size"""


def standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 `[..., C, H, W]` to float32 with mean 0 and deviation 1 per channel (`[C]` each).

    float32 images are left as they are.
    """
    if images.is_floating_point():
        return images
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


class ChunkDataset(Dataset[tuple[Tensor, int]]):
    """Images of one chunk. Copies none: it holds the data set's tensor and an index.

    `targets` is the list of labels that Avalanche looks for.
    """

    def __init__(
        self,
        images: Tensor,
        index: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        pixels: Tensor | None = None,
        style: str | None = None,
        in_time_order: bool = False,
    ) -> None:
        """Args: uint8 or float32 `[N, C, H, W]`, int64 `[n]` into it, int64 `[n]`, `[C]`, `[C]`.

        And the order of pixels, int64 `[H * W]`, the style, and whether images keep their order, as
        a `Chunk` has them.
        """
        self.images, self.index, self.labels = images, index, labels
        self.mean, self.std, self.pixels, self.style = mean, std, pixels, style
        self.in_time_order = in_time_order
        self.targets: list[int] = labels.tolist()

    def __len__(self) -> int:
        """Number of images n."""
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """One standardised image, float32 `[C, H, W]`, and its label."""
        images, _ = self.take(torch.tensor([item]))
        return standardise(images[0], self.mean, self.std), self.targets[item]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images `[n, C, H, W]` (a copy, not standardised), and labels, int64 `[n]`."""
        return self.take(torch.arange(len(self)))

    def take(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Some images `[k, C, H, W]` (a copy, not standardised), and their labels, int64 `[k]`."""
        index = self.index[items]
        images = self.images[index]
        if self.style is not None:
            images = restyle(images, index, self.style)
        if self.pixels is not None:
            images = images.flatten(2)[:, :, self.pixels].view_as(images)
        return images, self.labels[items]


def chunk_datasets(
    data: ImageData, chunks: list[Chunk]
) -> tuple[list[ChunkDataset], list[ChunkDataset]]:
    """Training and test sets of all chunks; standardised by the statistics of all training images.

    One standardisation for the whole stream keeps an image the same in every chunk.
    """
    mean, std = channel_stats(data.train_images)
    train = [
        ChunkDataset(
            data.train_images,
            c.train_index,
            c.train_labels,
            mean,
            std,
            c.pixels,
            c.style,
            c.in_time_order,
        )
        for c in chunks
    ]
    test = [
        ChunkDataset(data.test_images, c.test_index, c.test_labels, mean, std, c.pixels, c.style)
        for c in chunks
    ]
    return train, test


def make_benchmark(data: ImageData, chunks: list[Chunk]) -> Any:
    """An Avalanche benchmark with `train_stream` and `test_stream`, one experience per chunk.

    Batches are (x, y): x float32 `[B, C, H, W]`, y int64 `[B]`. Each experience carries
    `classes_in_this_experience`, the sorted labels it contains, and what `chunk_of` returns.
    """
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset

    train, test = chunk_datasets(data, chunks)
    benchmark = benchmark_from_datasets(
        train=[as_classification_dataset(d) for d in train],
        test=[as_classification_dataset(d) for d in test],
    )
    for stream, parts in ((benchmark.train_stream, train), (benchmark.test_stream, test)):
        for experience, part in zip(stream, parts, strict=True):
            experience.classes_in_this_experience = torch.unique(part.labels).tolist()
            experience.chunk_dataset = part
    return benchmark


def chunk_of(experience: Any) -> ChunkDataset:
    """The images behind an experience of `make_benchmark`, for a loader that takes them at once."""
    return experience.chunk_dataset


@dataclass
class Position:
    """Where training stands. `batch` counts the batches of the epoch that are done."""

    task: int = 0
    epoch: int = 0
    batch: int = 0


class Batches:
    """Training batches of one chunk; each iteration goes through `position`'s epoch.

    They are shuffled, unless the chunk is in time order.

    Args:
        dataset: the chunk.
        size: samples per batch; the last one may be smaller.
        seed: the run's seed.
        position: read at the start of an iteration, and moved on before each batch is handed out.
        device: where batches are made; the chunk's images are kept there as they are.
        augment: "crop-flip" for a random crop after padding by 4 pixels, and a random mirror image.
        part: (r, P) for every P-th row of each batch from row r on: those of one of P processes.

    Attributes:
        whole: images in the latest batch, with those of all parts.

    Yields:
        images float32 [B, C, H, W] standardised, labels int64 [B].
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        size: int,
        seed: int,
        position: Position,
        device: torch.device,
        augment: Augment = "none",
        part: tuple[int, int] = (0, 1),
    ) -> None:
        images, labels = dataset.tensors()
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = dataset.mean.to(device), dataset.std.to(device)
        self.in_time_order = dataset.in_time_order
        self.size, self.seed, self.position, self.augment = size, seed, position, augment
        self.whole, self.part = 0, part

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the position's epoch, from the first that is not done yet."""
        key = ("batches", self.position.task, self.position.epoch)
        if self.in_time_order:
            order = torch.arange(len(self.labels))
        else:
            order = torch.randperm(len(self.labels), generator=seeding.generator(self.seed, *key))
        parts = order.to(self.labels.device).split(self.size)
        for batch in range(self.position.batch, len(parts)):
            self.position.batch, self.whole = batch + 1, len(parts[batch])
            own = _take_part(parts[batch], self.part)
            images = standardise(self.images[own], self.mean, self.std)
            if self.augment == "crop-flip":
                generator = seeding.generator(self.seed, *key, batch)
                images = crop_flip(images, generator, self.whole, self.part)
            yield images, self.labels[own]


def _take_part(rows: Tensor, part: tuple[int, int]) -> Tensor:
    """Every P-th of rows [n, ...] from row r on, for a part (r, P)."""
    start, step = part
    return rows[start : len(rows) : step]


def crop_flip(
    images: Tensor,
    generator: torch.Generator,
    whole: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Shift each image [B, C, H, W] by up to 4 pixels (zeros come in) and mirror half of them.

    Args:
        images: of one batch, or a part of it.
        generator: draws for all images of the batch.
        whole: how many those are; default B.
        part: which of them these are, see `Batches`.
    """
    batch, _, height, width = images.shape
    whole = batch if whole is None else whole
    shifts = torch.randint(2 * CROP_PADDING + 1, (2, whole), generator=generator)
    mirror = torch.rand(whole, generator=generator) < 0.5
    if whole != batch:
        shifts, mirror = _take_part(shifts.T, part).T, _take_part(mirror, part)
    columns = torch.arange(width).expand(batch, -1)
    columns = torch.where(mirror[:, None], columns.flip(1), columns) + shifts[1][:, None]
    rows = torch.arange(height) + shifts[0][:, None]
    padded = F.pad(images, [CROP_PADDING] * 4).permute(0, 2, 3, 1)  # [B, H+8, W+8, C]
    sample = torch.arange(batch)[:, None, None].to(images.device)
    picked = padded[sample, rows[:, :, None].to(images.device), columns[:, None].to(images.device)]
    return picked.permute(0, 3, 1, 2)

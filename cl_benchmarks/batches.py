"""Batches of a chunk, straight from tensors in memory, in an order that can be resumed anywhere.

The order and the augmentation of an epoch depend on (seed, task, epoch) and, for augmentation, on
the batch; nothing has to be saved to go on in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_benchmarks.stream import ChunkDataset, standardise
from dynmoe import seeding
from dynmoe.moe.model import undisturbed

Augment = Literal["none", "crop-flip"]
CROP_PADDING = 4
"""pixels of zero padding around an image before a random crop of its own size"""


@dataclass
class Position:
    """Where training stands. `batch` counts the batches of the epoch that are done."""

    task: int = 0
    epoch: int = 0
    batch: int = 0


class Batches:
    """Training batches of one chunk; each iteration goes through `position`'s epoch.

    Args:
        dataset: the chunk.
        size: samples per batch; the last one may be smaller.
        seed: the run's seed.
        position: read at the start of an iteration, and moved on before each batch is handed out.
        device: where batches are made; the chunk's uint8 images are kept there.
        augment: "crop-flip" for a random crop after padding by 4 pixels, and a random mirror image.

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
    ) -> None:
        images, labels = dataset.tensors()
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = dataset.mean.to(device), dataset.std.to(device)
        self.size, self.seed, self.position, self.augment = size, seed, position, augment

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the position's epoch, from the first that is not done yet."""
        key = ("batches", self.position.task, self.position.epoch)
        order = torch.randperm(len(self.labels), generator=seeding.generator(self.seed, *key))
        parts = order.to(self.labels.device).split(self.size)
        for batch in range(self.position.batch, len(parts)):
            self.position.batch = batch + 1
            images = standardise(self.images[parts[batch]], self.mean, self.std)
            if self.augment == "crop-flip":
                images = crop_flip(images, seeding.generator(self.seed, *key, batch))
            yield images, self.labels[parts[batch]]


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image [B, C, H, W] by up to 4 pixels (zeros come in) and mirror half of them."""
    batch, _, height, width = images.shape
    shifts = torch.randint(2 * CROP_PADDING + 1, (2, batch), generator=generator)
    mirror = torch.rand(batch, generator=generator) < 0.5
    columns = torch.arange(width).expand(batch, -1)
    columns = torch.where(mirror[:, None], columns.flip(1), columns) + shifts[1][:, None]
    rows = torch.arange(height) + shifts[0][:, None]
    padded = F.pad(images, [CROP_PADDING] * 4).permute(0, 2, 3, 1)  # [B, H+8, W+8, C]
    sample = torch.arange(batch)[:, None, None].to(images.device)
    picked = padded[sample, rows[:, :, None].to(images.device), columns[:, None].to(images.device)]
    return picked.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(
    model: nn.Module, dataset: ChunkDataset, device: torch.device, samples: int = 0
) -> float:
    """Share of a chunk's images that the model labels right, in evaluation mode.

    Args:
        samples: look at that many evenly spaced images only; 0 for all.
    """
    images, labels = dataset.tensors()
    if 0 < samples < len(labels):
        index = torch.linspace(0, len(labels) - 1, samples).long()
        images, labels = images[index], labels[index]
    mean, std, right = dataset.mean.to(device), dataset.std.to(device), 0
    with undisturbed(model):
        for part, target in zip(images.split(512), labels.split(512), strict=True):
            logits = model(standardise(part.to(device), mean, std))
            right += int((logits.argmax(1) == target.to(device)).sum())
    return right / len(labels)

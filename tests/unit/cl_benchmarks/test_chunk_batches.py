"""Batches of a chunk, its augmentation and accuracy on it, held against the plainest code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cl_benchmarks.measuring import accuracy
from cl_benchmarks.stream import CROP_PADDING, Batches, ChunkDataset, Position, crop_flip

CPU = torch.device("cpu")


def _chunk(count: int = 23, size: int = 8, seed: int = 0) -> ChunkDataset:
    """Every image is different; its label is its number."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 2, size, size), generator=generator).to(torch.uint8)
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    return ChunkDataset(images, torch.arange(count), torch.arange(count), mean, std)


def test_every_sample_once_per_epoch() -> None:
    chunk = _chunk()
    orders = []
    for task, epoch, seed in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]:
        batches = list(Batches(chunk, 5, seed, Position(task, epoch), CPU))
        assert [len(y) for _, y in batches] == [5, 5, 5, 5, 3]
        order = torch.cat([y for _, y in batches]).tolist()
        assert sorted(order) == list(range(23))
        orders.append(tuple(order))
        for x, y in batches:
            assert x.dtype == torch.float32
            for image, label in zip(x, y.tolist(), strict=True):
                assert torch.equal(image, chunk[label][0])
    assert len(set(orders)) == 4
    assert len(Batches(chunk, 5, 0, Position(), CPU)) == 5


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_resumed_epoch_is_the_tail(augment: Any) -> None:
    chunk = _chunk()
    whole = list(Batches(chunk, 5, 3, Position(2, 1), CPU, augment))
    for done in range(6):
        position = Position(2, 1, done)
        tail = list(Batches(chunk, 5, 3, position, CPU, augment))
        assert len(tail) == 5 - done and position.batch == 5
        for (x, y), (a, b) in zip(whole[done:], tail, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


def test_crop_flip_is_the_naive_loop() -> None:
    images = torch.randn(40, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    out = crop_flip(images, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    shifts = torch.randint(2 * CROP_PADDING + 1, (2, 40), generator=generator)
    mirror = torch.rand(40, generator=generator) < 0.5
    assert 5 < mirror.sum() < 35 and {0, 2 * CROP_PADDING} <= set(shifts.flatten().tolist())
    for i, image in enumerate(images):
        padded = torch.zeros(3, 8 + 2 * CROP_PADDING, 12 + 2 * CROP_PADDING)
        padded[:, CROP_PADDING:-CROP_PADDING, CROP_PADDING:-CROP_PADDING] = image
        row, column = shifts[:, i].tolist()
        crop = padded[:, row : row + 8, column : column + 12]
        assert torch.equal(out[i], crop.flip(2) if mirror[i] else crop)


def test_accuracy_is_the_naive_share() -> None:
    chunk = _chunk(count=1300, size=2)
    chunk.labels = chunk.labels % 3
    chunk.targets = chunk.labels.tolist()
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Dropout(0.5)).train()

    def naive(numbers: list[int]) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for number in numbers:
                image, label = chunk[number]
                right += int(model(image[None]).argmax()) == label
        model.train()
        return right / len(numbers)

    assert accuracy(model, chunk, CPU) == naive(list(range(1300)))
    assert accuracy(model, chunk, CPU, samples=5000) == naive(list(range(1300)))
    assert accuracy(model, chunk, CPU, samples=7) == naive([0, 216, 433, 649, 866, 1082, 1299])
    assert model.training

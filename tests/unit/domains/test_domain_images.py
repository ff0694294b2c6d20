"""Preparing and augmenting images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from domain_helpers import png
from PIL import Image

from cl_benchmarks.domain_set import CROP, GRAY, Domain, Preparation, _crop, augment

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def noise(count: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, rows, columns)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def test_values_are_scaled_and_normalised() -> None:
    images = noise(3, 8, 8)
    domain = Domain("x", images, torch.zeros(3, dtype=torch.long))
    got = Preparation(8, MEAN, STD).batch(domain, torch.tensor([2, 0]))
    for row, index in enumerate((2, 0)):
        for c in range(3):
            want = (images[index, c].double() / 255 - MEAN[c]) / STD[c]
            assert torch.allclose(got[row, c].double(), want, atol=1e-5)


def test_files_of_any_shape_become_squares(tmp_path: Path) -> None:
    """As PIL resizes them, which DomainBed leaves it to."""
    pixels = noise(1, 40, 30)[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png((10, 20, 30), (7, 3)))
    files = (tmp_path / "a.png", tmp_path / "b.png")
    domain = Domain("x", files, torch.zeros(2, dtype=torch.long))
    got = Preparation(16, (0, 0, 0), (1, 1, 1)).batch(domain, torch.arange(2))
    want = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR))
    assert got.shape == (2, 3, 16, 16)
    assert np.abs(got[0].permute(1, 2, 0).numpy() * 255 - want).max() <= 1.01
    assert torch.allclose(got[1, :, 0, 0] * 255, torch.tensor([10.0, 20.0, 30.0]))


def test_a_crop_keeps_area_and_sides_within_bounds() -> None:
    generator, areas = torch.Generator().manual_seed(0), []
    for _ in range(300):
        top, left, height, width = _crop((60, 80), generator)
        assert 0 <= top <= 60 - height and 0 <= left <= 80 - width
        assert 0.72 < width / height < 1.38
        areas.append(height * width / 4800)
    assert CROP[0] - 0.03 < min(areas) < 0.74 and 0.85 < max(areas) <= 1


def test_a_crop_of_a_strip_falls_back_to_its_middle() -> None:
    assert _crop((100, 10), torch.Generator()) == (43, 0, 13, 10)


def test_augmentation_repeats_with_its_generator_and_varies() -> None:
    image = noise(1, 20, 24)[0]
    domain = Domain("x", image[None].repeat(6, 1, 1, 1), torch.zeros(6, dtype=torch.long))
    prepare, chosen = Preparation(12, MEAN, STD), torch.arange(6)
    one, two = (prepare.batch(domain, chosen, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (6, 3, 12, 12)
    assert len({tuple(x.flatten().tolist()) for x in one}) == 6
    assert not torch.equal(one, prepare.batch(domain, chosen))


def test_how_often_images_are_mirrored_and_gray() -> None:
    """A red left half under a dark right half shows the mirror by its side."""
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[0, :, :8] = 200
    generator, mirrored, gray = torch.Generator().manual_seed(5), 0, 0
    for _ in range(400):
        seen = augment(image, 16, generator).float()
        mirrored += int(seen[:, :, 12:].sum() > seen[:, :, :4].sum())
        gray += int((seen.amax(0) - seen.amin(0)).max() <= 1)
    assert 160 < mirrored < 240
    assert 400 * GRAY * 0.5 < gray < 400 * GRAY * 1.6


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3)])
def test_tiny_and_narrow_images_can_be_augmented(shape: tuple[int, int]) -> None:
    for seed in range(5):
        seen = augment(noise(1, *shape)[0], 8, torch.Generator().manual_seed(seed))
        assert seen.shape == (3, 8, 8) and seen.dtype == torch.uint8

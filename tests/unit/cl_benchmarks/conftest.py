"""What the tests of this folder share: a cache of their own, small data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cl_benchmarks.images import ImageData


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, home or working folder."""
    for name in ("cache", "home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def data() -> ImageData:
    """12 classes, 20 training and 5 test images each, shuffled, random 2x4x4 pixels."""
    g = torch.Generator().manual_seed(0)
    train = torch.arange(12).repeat_interleave(20)[torch.randperm(240, generator=g)]
    test = torch.arange(12).repeat_interleave(5)[torch.randperm(60, generator=g)]
    return ImageData(
        name="random",
        train_images=torch.randint(256, (240, 2, 4, 4), generator=g).to(torch.uint8),
        train_labels=train,
        test_images=torch.randint(256, (60, 2, 4, 4), generator=g).to(torch.uint8),
        test_labels=test,
        num_classes=12,
    )

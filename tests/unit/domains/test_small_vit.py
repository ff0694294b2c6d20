"""The embedded backbone: trained once, then read from the cache."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks.backbone import SmallVit, embedded_vit, fit, new_vit, training_images
from dynmoe.dg.backbone import check_backbone
from dynmoe.errors import UserError
from dynmoe.lab import cache

TINY = SmallVit(size=16, dim=16, depth=2, heads=2, per_class=3, epochs=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_it_is_trained_once_and_the_same_again(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    first = embedded_vit(TINY)
    assert "training the embedded one" in capsys.readouterr().err
    again = embedded_vit(TINY)
    assert capsys.readouterr().err == ""
    next(own_cache.glob("dynmoe/small-vit-*.npz")).unlink()
    again = embedded_vit(TINY)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), name
    assert not first.training and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first.state_dict()["norm.weight"], new_vit(TINY).norm.weight)
    x = torch.randn(2, 3, 16, 16)
    assert first(x).shape == (2, 16)
    check_backbone(first)


def test_other_settings_are_other_weights(own_cache: Path) -> None:
    embedded_vit(TINY)
    embedded_vit(SmallVit(size=16, dim=16, depth=2, heads=2, per_class=3, epochs=1, seed=1))
    assert len(list(own_cache.glob("dynmoe/small-vit-*.npz"))) == 2


def test_training_lowers_the_loss_of_a_linear_classifier() -> None:
    """Told by how well the classes' mean features separate two classes of images."""
    settings = SmallVit(size=16, dim=16, depth=1, heads=2, epochs=60)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    labels = torch.arange(2).repeat(32)
    images[labels == 1, :, :8] += 1.0
    model = new_vit(settings)

    def gap() -> float:
        with torch.no_grad():
            z = model.eval()(images)
        a, b = z[labels == 0], z[labels == 1]
        return float((a.mean(0) - b.mean(0)).norm() / (a.std(0).norm() + b.std(0).norm()))

    before = gap()
    fit(model, images, labels, settings)
    assert gap() > 2 * before


def test_its_images() -> None:
    images, labels = training_images(TINY)
    assert images.shape == (300, 3, 16, 16) and images.min() >= -1 and images.max() <= 1
    assert labels.bincount().tolist() == [3] * 100


def test_its_styles_can_be_kept_from_it(own_cache: Path) -> None:
    """Plain and blocky images are gray. With all styles the cached file has its old name."""
    gray, _ = training_images(replace(TINY, styles=("plain", "blocky")))
    mixed, _ = training_images(TINY)
    assert torch.equal(gray[:, 0], gray[:, 1]) and not torch.equal(mixed[:, 0], mixed[:, 1])
    settings = {name: value for name, value in asdict(TINY).items() if name != "styles"}
    embedded_vit(TINY)
    (kept,) = own_cache.glob("dynmoe/small-vit-*.npz")
    assert cache.digest({"version": 1, **settings}) in kept.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 7}, "patch 7 does not divide its size 32"),
        ({"patch": 0}, "patch 0"),
        ({"heads": 5}, "heads 5 does not divide its dim 64"),
        ({"depth": 0}, "depth 0 is too small"),
        ({"per_class": 0}, "per_class 0 is too small"),
        ({"epochs": -1}, "epochs -1 is too small"),
        (
            {"styles": ("plain", "plane")},
            "unknown style .*Did you mean 'plain",
        ),
        ({"styles": ("plain", "plain")}, "--vit.styles names plain twice"),
    ],
)
def test_bad_geometry(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        embedded_vit(SmallVit(**options))

"""Corruptions: the library's, seeded, and our own at 32 pixels."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_benchmarks.shifts import domain, embedded
from cl_benchmarks.shifts.domain import CORRUPTIONS, EXTRA, Corrupted, Memory
from cl_benchmarks.shifts.embedded import Embedded, EmbeddedConfig
from dynmoe.errors import UserError

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow",
          "frost", "fog", "elastic_transform", "speckle_noise", "spatter"}  # fmt: skip
TINY = EmbeddedConfig(classes=3, train_per_class=4, test_per_class=4)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 8, 8), generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear")[0]
    return (255 * smooth).to(torch.uint8)


@pytest.mark.thin(7)
@pytest.mark.parametrize("name", [*CORRUPTIONS, *EXTRA])
def test_library_is_decided_by_the_seed(picture: Tensor, name: str) -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    one = domain.corrupt(picture, name, 5, 1)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(6)
    two, other = (domain.corrupt(picture, name, 5, seed) for seed in (1, 2))
    assert one.shape == picture.shape and one.dtype == torch.uint8
    assert torch.equal(one, two) and not torch.equal(one, picture)
    assert torch.equal(one, other) == (name not in RANDOM)


def test_library_corruptions_are_kept_per_image(picture: Tensor) -> None:
    images = torch.stack([picture, 255 - picture, picture])
    clean = Memory("clean", images, torch.arange(3))
    domain = Corrupted(clean, "some", "gaussian_noise", 3, seed=0)
    both = domain.images([2, 1])
    clean.tensor = torch.zeros_like(images)
    assert torch.equal(domain.images([1])[0], both[1])
    assert not torch.equal(domain.images([0])[0], both[0])  # made now, of zeros
    assert domain.name == "gaussian_noise" and domain.labels.tolist() == [0, 1, 2]


def test_library_bad_input(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown corruption"):
        domain.corrupt(picture, "rain", 5, 0)
    with pytest.raises(UserError, match="severity 0"):
        domain.corrupt(picture, "fog", 0, 0)
    with pytest.raises(UserError, match="20x20; corruptions need 32x32"):
        domain.corrupt(picture[:, :20, :20], "fog", 1, 0)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match=r"dynmoe\[tta\]"):
        domain.corrupt(picture, "fog", 1, 0)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_small_ones_repeat_and_grow_with_severity(name: str) -> None:
    clean = Embedded(TINY).other("clean").images(range(12))
    made = [embedded.corrupt(clean, name, severity, seed=0) for severity in (1, 3, 5)]
    assert all(m.shape == clean.shape and m.dtype == torch.uint8 for m in made)
    assert torch.equal(made[1], embedded.corrupt(clean, name, 3, seed=0))
    distances = [float((m.double() - clean.double()).square().mean()) for m in made]
    assert 0 < distances[0] < distances[1] < distances[2], distances
    changed = embedded.corrupt(clean, name, 5, seed=1)
    assert torch.equal(made[2], changed) == (name not in RANDOM)


def test_small_ones_know_no_extra_corruption() -> None:
    with pytest.raises(UserError, match="'spatter' has no 32-pixel version"):
        embedded.corrupt(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "spatter", 1, 0)


def test_contrast_and_jpeg_by_hand() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    flat = embedded.KINDS["contrast"](x, 4, torch.Generator())
    torch.testing.assert_close(flat.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(flat.std((1, 2, 3)), 0.12 * x.std((1, 2, 3)))
    constant = torch.full((1, 3, 12, 20), 0.5)  # its only coefficient, 4, is a multiple of .175
    step = 0.35 / 2
    rounded = round(4 / step) * step / 8
    jpeg = embedded.KINDS["jpeg_compression"](constant, 2, torch.Generator())
    torch.testing.assert_close(jpeg, torch.full_like(constant, rounded))


def test_embedded_domains() -> None:
    data = Embedded(TINY)
    names = ("clean", "rendition", "sketch", "adversarial")
    domains = {name: data.other(name).images(range(12)) for name in names}
    assert all(d.shape == (12, 3, 32, 32) for d in domains.values())
    assert domains["sketch"].float().mean() > 200 > 100 > domains["clean"].float().mean()
    assert not torch.equal(domains["clean"], domains["adversarial"])
    fog = data.corrupted("fog", 5)
    assert torch.equal(fog.images([3, 7]), Embedded(TINY).corrupted("fog", 5).images([3, 7]))
    assert fog.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    images, labels = data.training_images()
    assert images.shape == (12, 3, 32, 32) and labels.tolist() == fog.labels.tolist()


@pytest.mark.parametrize(
    "options", [{"classes": 1}, {"classes": 201}, {"size": 8}, {"test_per_class": 0}]
)
def test_embedded_bad_sizes(options: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Embedded(EmbeddedConfig(**options))

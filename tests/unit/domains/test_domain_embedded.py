"""Domains made of embedded images, and the styles that they are drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks import fractals
from cl_benchmarks.backbone import FIRST_CLASS
from cl_benchmarks.domains.embedded import MOST, STYLES, Embedded, draw
from dynmoe.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def small(**options: Any) -> Embedded:
    return Embedded(Embedded.Config(**{"classes": 3, "per_class": 5, "size": 16, **options}))


def gray(count: int = 6, size: int = 16) -> torch.Tensor:
    return fractals.render([0, 1], count // 2, size, "easy", 0, "train")[:, 0]


@pytest.mark.parametrize("content", ["fractals", "digits"])
def test_shapes_and_repeatability(content: str) -> None:
    styles = ("plain", "edges", "noisy")
    one, two = (small(content=content, styles=styles).load() for _ in range(2))
    assert one.names == list(styles) and len(one.classes) == 3
    for a, b in zip(one.domains, two.domains, strict=True):
        assert isinstance(a.images, torch.Tensor) and isinstance(b.images, torch.Tensor)
        assert a.images.shape == (15, 3, 16, 16) and torch.equal(a.images, b.images)
        assert a.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("content", ["fractals", "digits"])
def test_no_image_is_in_two_domains(content: str) -> None:
    data = small(content=content, styles=("plain", "rotated")).load()
    twice = small(content=content, styles=("plain", "edges"), per_class=10).load()
    own = data.domains[0].images
    assert isinstance(own, torch.Tensor) and isinstance(twice.domains[0].images, torch.Tensor)
    both = twice.domains[0].images.view(3, 10, 3, 16, 16)
    assert torch.equal(own.view(3, 5, 3, 16, 16), both[:, :5])  # the second half went to the other
    seen = {tuple(x.flatten().tolist()) for x in both.flatten(0, 1)}
    assert len(seen) == 30


def test_the_backbone_learns_from_other_fractals() -> None:
    assert MOST["fractals"] <= FIRST_CLASS


@pytest.mark.parametrize("style", STYLES)
def test_a_style_repeats_and_keeps_shape_and_type(style: str) -> None:
    images = gray()
    one, two = (draw(images, style, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (6, 3, 16, 16) and one.dtype == torch.uint8 and torch.equal(one, two)
    assert one.float().flatten(1).std(dim=1).min() > 5  # something is to be seen in each image


def test_styles_differ_from_one_another() -> None:
    drawn = {s: draw(gray(), s, torch.Generator().manual_seed(1)).float() for s in STYLES}
    names = list(STYLES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (drawn[a] - drawn[b]).abs().mean() > 2, (a, b)


def test_what_single_styles_do() -> None:
    images = gray()
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(draw(images, "plain", generator)[:, 1], images)
    blocks = draw(images[:, :15, :15], "blocky", generator)
    assert torch.equal(
        blocks[:, :, ::3, ::3].repeat_interleave(3, 2).repeat_interleave(3, 3), blocks
    )
    flat = torch.full((1, 9, 9), 77, dtype=torch.uint8)
    assert (draw(flat, "edges", generator) == 0).all()  # no slope, no line
    light = draw(images, "coloured", generator).double().mean(1) / 255
    front, back = light[images == 255], light.flatten(1)[:, 0]
    assert (images[:, 0, 0] == 0).all() and front.min() > back.min()
    for seen, image in zip(light, images, strict=True):
        assert seen[image == 255].mean() - seen[image == 0].mean() > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": ("plain",)}, "styles plain: name two or more"),
        ({"styles": ("plain", "plain")}, "each once"),
        ({"styles": ("plain", "edge")}, "unknown style 'edge'.*Did you mean 'edges'"),
        ({"classes": 1}, "classes 1 is out of range; use 2 to 100"),
        ({"classes": 101}, "classes 101 is out of range; use 2 to 100"),
        ({"content": "digits", "classes": 11}, "use 2 to 10"),
        ({"per_class": 4}, "per_class 4 is too small"),
        ({"content": "digits", "per_class": 60}, "use at most 43"),
        ({"size": 4}, "size 4 is out of range"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        small(**options)
    assert "\n" not in str(error.value)

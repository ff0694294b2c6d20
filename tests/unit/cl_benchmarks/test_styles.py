"""Styles, and the domain-incremental protocol made of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocols.domains import Domains
from cl_benchmarks.stream import chunk_datasets
from cl_benchmarks.styles import STYLES, restyle
from dynmoe.errors import UserError


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (5, 1, 16, 12), (2, 2, 4, 4)])
def test_styles_keep_shapes_and_differ(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(shape[0], shape[1], 4, 4, generator=g) * 255
    images = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear").to(torch.uint8)
    numbers = torch.arange(len(images)) + 7
    before = images.clone()
    found = {name: restyle(images, numbers, name) for name in STYLES}
    assert images.equal(before) and found["none"].equal(images)
    for styled in found.values():
        assert styled.dtype == torch.uint8 and styled.shape == images.shape
    if shape[2] > 4:
        for one, other in combinations(found, 2):
            gap = (found[one].float() - found[other].float()).abs().mean()
            assert gap > 3, (one, other)  # gray levels; blurring a smooth image does least


def test_a_style_does_not_depend_on_the_batch() -> None:
    images = torch.randint(256, (600, 3, 8, 8), dtype=torch.uint8)
    numbers = torch.randperm(10_000)[:600]
    pick = torch.tensor([599, 3, 512])
    for name in STYLES:
        whole = restyle(images, numbers, name)
        assert restyle(images[pick], numbers[pick], name).equal(whole[pick]), name
    noisy = restyle(torch.full((2, 1, 8, 8), 128, dtype=torch.uint8), torch.tensor([1, 2]), "noise")
    assert not noisy[0].equal(noisy[1])


def test_chunks_are_parts_in_styles(data: ImageData) -> None:
    chunks = Domains.Config(order="fixed").build().split(data, 4, 0)
    assert [c.style for c in chunks] == list(STYLES)[:4]
    seen = torch.cat([c.train_index for c in chunks])
    assert seen.sort().values.equal(torch.arange(240))
    for chunk in chunks:
        assert chunk.train_labels.bincount(minlength=12).tolist() == [5] * 12
        assert chunk.test_index.equal(torch.arange(60))
    train, test = chunk_datasets(data, chunks)
    images, labels = train[1].tensors()
    assert images.equal(255 - data.train_images[chunks[1].train_index])
    assert labels.equal(data.train_labels[chunks[1].train_index])
    assert test[1].take(torch.tensor([5]))[0].equal(255 - data.test_images[5:6])


def test_options_of_domains(data: ImageData) -> None:
    make = Domains.Config
    same = make(images="same", test_images=24).build().split(data, 5, 1)
    for chunk in same:
        assert chunk.train_index.equal(torch.arange(240)) and len(chunk.test_index) == 24
        assert chunk.test_labels.bincount(minlength=12).tolist() == [2] * 12
    orders = [[c.style for c in make().build().split(data, 6, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and len(set(orders[0])) == 6
    assert {len(c.train_index) for c in make().build().split(data, 7, 0)} == {34}
    with pytest.raises(UserError, match="99 chunks are more than the 13 styles; use --chunks 13"):
        make().build().split(data, 99, 0)
    with pytest.raises(UserError, match="use --access limited"):
        make().build().stream(data, 2, "cumulative", 0)


def test_domains_that_the_data_tell(data: ImageData) -> None:
    told = replace(
        data,
        domain_names=("indoors", "street", "forest"),
        train_domains=torch.arange(240) % 3,
        test_domains=torch.arange(60) % 3,
    )
    chunks = Domains.Config(order="fixed").build().split(told, 3, 0)
    for domain, chunk in enumerate(chunks):
        assert chunk.style is None and set((chunk.train_index % 3).tolist()) == {domain}
        assert chunk.test_index.equal(torch.arange(60)[torch.arange(60) % 3 == domain])
    with pytest.raises(UserError, match="4 chunks are more than the 3 domains of random"):
        Domains.Config().build().split(told, 4, 0)


def test_domains_kept_for_tests_test_every_chunk(data: ImageData) -> None:
    told = replace(  # as CORe50: sessions to learn, and others to test on
        data,
        domain_names=("s1", "s2", "s3"),
        train_domains=torch.arange(240) % 2,
        test_domains=torch.full((60,), 2),
    )
    for chunk in Domains.Config().build().split(told, 2, 0):
        assert chunk.test_index.equal(torch.arange(60))

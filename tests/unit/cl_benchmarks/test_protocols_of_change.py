"""Protocols whose tasks run into each other, end unannounced, or change the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, balanced_subset, generator
from cl_benchmarks.stream import chunk_datasets, chunk_of, make_benchmark, standardise
from dynmoe import registry
from dynmoe.errors import UserError


def _make(name: str, **options: Any) -> Protocol:
    return registry.get("protocol", name).Config(**options).build()


def _large(classes: int = 10, each: int = 200) -> ImageData:
    """Images that are nothing but their class and number."""
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    return ImageData("flat", images, labels, images[::20], labels[::20], classes)


# ---------------------------------------------------------------- warm start


def test_warm_start_is_a_small_noisy_part_and_then_everything(data: ImageData) -> None:
    first, *rest = _make("warmstart", share=0.25).split(data, 3, 0)
    assert len(first.train_index) == 60
    assert data.train_labels[first.train_index].bincount(minlength=12).tolist() == [5] * 12
    wrong = int((first.train_labels != data.train_labels[first.train_index]).sum())
    assert 18 <= wrong <= 30  # of 30 labels drawn, one in twelve comes out right
    for chunk in rest:
        assert chunk.train_index.equal(torch.arange(240))
        assert chunk.train_labels.equal(data.train_labels)
    for chunk in (first, *rest):
        assert chunk.test_index.equal(torch.arange(60))
        assert chunk.test_labels.equal(data.test_labels)


def test_ash_and_adams_warm_start_is_clean(data: ImageData) -> None:
    first, second = _make("warmstart", share=0.5, noise=0.0).split(data, 2, 3)
    assert len(first.train_index) == 120 and len(second.train_index) == 240
    assert first.train_labels.equal(data.train_labels[first.train_index])
    with pytest.raises(UserError, match="use --access limited"):
        _make("warmstart").stream(data, 2, "cumulative", 0)
    with pytest.raises(UserError, match="1 chunks are too few for a warm start; use --chunks 2"):
        _make("warmstart").split(data, 1, 0)


def test_a_balanced_subset_takes_classes_in_turn() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 40)
    rng = generator(0, "x")
    for count in (1, 2, 7, 11, 30, 93):
        index = balanced_subset(labels, count, rng)
        counts = labels[index].bincount(minlength=3).tolist()
        assert len(index.unique()) == count and sum(counts) == count
        if 9 < count < 83:
            assert counts[1] == 3 and abs(counts[0] - counts[2]) <= 1
    firsts = {int(labels[balanced_subset(labels, 1, generator(seed, "y"))]) for seed in range(20)}
    assert firsts == {0, 1, 2}  # no class is always the first


# ---------------------------------------------------------------- permuted pixels


def test_permuted_images_are_the_same_pixels_in_one_order(data: ImageData) -> None:
    chunks = _make("permuted", images=30).split(data, 3, 0)
    train, test = chunk_datasets(data, chunks)
    orders = {tuple(c.pixels.tolist()) for c in chunks if c.pixels is not None}
    assert len(orders) == 3 and all(sorted(o) == list(range(16)) for o in orders)
    for c, *parts in zip(chunks, train, test, strict=True):
        assert c.train_index.equal(chunks[0].train_index) and c.pixels is not None
        assert c.train_labels.equal(data.train_labels[c.train_index])
        both = (data.train_images[c.train_index], data.test_images)
        for part, plain in zip(parts, both, strict=True):
            images, _ = part.tensors()
            for number in (0, 7, len(part) - 1):
                for channel in range(2):
                    expected = [plain[number, channel].flatten()[int(p)] for p in c.pixels]
                    assert images[number, channel].flatten().tolist() == expected
                item, label = part[number]
                assert item.equal(standardise(images[number], part.mean, part.std))
                assert label == int(part.labels[number])
            some, labels = part.take(torch.tensor([3, 1]))
            assert some.equal(images[[3, 1]]) and labels.equal(part.labels[[3, 1]])


def test_permuted_takes_all_images_for_0_and_no_more_than_there_are(data: ImageData) -> None:
    assert len(_make("permuted", images=0).split(data, 2, 0)[0].train_index) == 240
    with pytest.raises(UserError, match="images 241 is more than the 240 .*--protocol.images 240"):
        _make("permuted", images=241).split(data, 2, 0)
    with pytest.raises(UserError, match="permuted .*--access limited"):
        _make("permuted", images=9).stream(data, 2, "cumulative", 0)


@pytest.mark.filterwarnings("ignore")
def test_avalanche_gets_the_permuted_pixels(data: ImageData) -> None:
    chunks = _make("permuted", images=20).split(data, 2, 0)
    for experience in make_benchmark(data, chunks).train_stream:
        images, _ = chunk_of(experience).tensors()
        part = chunk_of(experience)
        for number in (0, 19):
            assert experience.dataset[number][0].equal(
                standardise(images[number], part.mean, part.std)
            )


# ---------------------------------------------------------------- blurred boundaries


def _foreign(data: ImageData, plain: list[Chunk], chunks: list[Chunk]) -> list[dict[int, int]]:
    """chunk -> {distance to the chunk that an image belongs to: how many such images}."""
    home = {int(i): k for k, c in enumerate(plain) for i in c.train_index}
    out = []
    for k, c in enumerate(chunks):
        steps = [home[int(i)] - k for i in c.train_index]
        out.append({step: steps.count(step) for step in set(steps)})
    return out


@pytest.mark.parametrize("head", ["shared", "full"])
def test_blurred_neighbours_exchange_images(head: str) -> None:
    data = _large()
    plain = _make("class", head=head).split(data, 5, 0)
    chunks = _make("blurred", head=head, width=1.0).split(data, 5, 0)
    every = torch.cat([c.train_index for c in chunks])
    assert every.sort().values.equal(torch.arange(2000))  # each image once
    label = {
        int(i): int(y) for c in plain for i, y in zip(c.train_index, c.train_labels, strict=True)
    }
    for k, (c, p) in enumerate(zip(chunks, plain, strict=True)):
        assert len(c.train_index) == 400
        assert [label[int(i)] for i in c.train_index] == c.train_labels.tolist()
        assert c.test_index.equal(p.test_index) and c.test_labels.equal(p.test_labels)
        exchanged = _foreign(data, plain, chunks)[k]
        sides = {-1, 1} - ({-1} if k == 0 else {1} if k == 4 else set())
        assert exchanged.keys() == {0, *sides}
        for side in sides:  # 400 / 8 = 50 expected, deviation below 6
            assert 25 < exchanged[side] < 75


def test_the_chance_falls_linearly_from_a_half_at_the_boundary() -> None:
    data = _large(classes=2, each=400)
    plain = _make("class", head="full").split(data, 2, 0)
    count, swapped = 300, torch.zeros(400)
    for seed in range(count):
        chunks = _make("blurred", width=0.5, head="full").split(data, 2, seed)
        own = set(_make("class", head="full").split(data, 2, seed)[0].train_index.tolist())
        swapped += torch.tensor([int(i) not in own for i in chunks[0].train_index])
    chance = swapped / count
    distance = torch.arange(399, -1, -1)
    expected = (0.5 * (1 - distance / 100)).clamp_min(0)
    assert len(plain) == 2 and (chance[:300] == 0).all()
    assert (chance - expected)[300:].abs().mean() < 0.04
    assert (chance - expected)[300:].reshape(10, 10).mean(dim=1).abs().max() < 0.04


def test_blurred_of_width_0_is_the_class_protocol(data: ImageData) -> None:
    for p, c in zip(
        _make("class").split(data, 4, 1), _make("blurred", width=0.0).split(data, 4, 1), strict=True
    ):
        assert c.train_index.sort().values.equal(p.train_index.sort().values)


# ---------------------------------------------------------------- unknown lengths


def test_unknown_chunks_are_class_chunks_of_random_length() -> None:
    data = _large()
    lengths = []
    for seed in range(6):
        plain = _make("class", head="full").split(data, 10, seed)
        chunks = _make("unknown", least=0.5, head="full").split(data, 10, seed)
        for p, c in zip(plain, chunks, strict=True):
            assert set(c.train_index.tolist()) <= set(p.train_index.tolist())
            assert c.test_index.equal(p.test_index) and len(c.train_labels.unique()) == 1
            lengths.append(len(c.train_index))
    assert 100 <= min(lengths) < 115 and 185 < max(lengths) <= 200
    assert len(set(lengths)) > 30 and 140 < sum(lengths) / 60 < 160
    whole = _make("unknown", least=1.0, head="full").split(data, 10, 0)
    assert [len(c.train_index) for c in whole] == [200] * 10


@pytest.mark.parametrize("name", ["blurred", "unknown"])
def test_they_cumulate_as_the_class_protocol_does(name: str, data: ImageData) -> None:
    with pytest.raises(UserError, match=f"protocol {name} and head shared .*--protocol.head full"):
        _make(name).stream(data, 4, "cumulative", 0)
    joined = _make(name, head="full").stream(data, 4, "cumulative", 0)
    sizes = [len(c.train_index) for c in joined]
    assert sizes == sorted(sizes) and (sizes[-1] == 240 or name == "unknown")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("warmstart", "share", 0.0), ("warmstart", "share", 1.1), ("warmstart", "noise", -0.1),
     ("warmstart", "noise", float("nan")), ("permuted", "images", -1), ("blurred", "width", 1.5),
     ("blurred", "width", -0.1), ("unknown", "least", 0.0), ("unknown", "least", 2.0)],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"protocol {option} {value}") as caught:
        _make(name, **{option: value})
    assert "\n" not in str(caught.value)

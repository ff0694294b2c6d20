"""What each protocol promises about its chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, cumulative
from dynmoe import registry
from dynmoe.errors import UserError

NAMES = registry.names("protocol")


def _make(name: str, **options: Any) -> Protocol:
    if name in ("shuffle", "permuted"):
        options = {"images": 100, **options}
    return registry.get("protocol", name).Config(**options).build()


def _tensors(chunk: Chunk) -> list[Tensor]:
    own = [chunk.train_index, chunk.train_labels, chunk.test_index, chunk.test_labels]
    return own if chunk.pixels is None else [*own, chunk.pixels]


def _same(a: list[Chunk], b: list[Chunk]) -> bool:
    pairs = [
        (x, y)
        for c, d in zip(a, b, strict=True)
        for x, y in zip(_tensors(c), _tensors(d), strict=True)
    ]
    return all(torch.equal(x, y) for x, y in pairs)


def _data(name: str, data: ImageData) -> ImageData:
    """What the protocol takes: the online one needs rows in time order, which test themselves."""
    if name != "online":
        return data
    return replace(
        data, in_time_order=True, test_images=data.train_images, test_labels=data.train_labels
    )


def test_the_protocols_are_there() -> None:
    new = {"warmstart", "permuted", "blurred", "unknown"}
    assert {"iid", "class", "noise", "shuffle", *new} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_are_well_formed_and_follow_the_seed(name: str, data: ImageData) -> None:
    protocol, data = _make(name), _data(name, data)
    chunks = protocol.split(data, 4, seed=0)
    assert len(chunks) == 4
    outputs = protocol.num_outputs(data, 4)
    for c in chunks:
        assert all(t.dtype == torch.int64 and t.dim() == 1 for t in _tensors(c))
        assert len(c.train_index) == len(c.train_labels) > 0
        assert len(c.test_index) == len(c.test_labels) > 0
        assert len(c.train_index.unique()) == len(c.train_index)
        assert c.train_index.min() >= 0 and c.train_index.max() < len(data.train_labels)
        assert c.test_index.min() >= 0 and c.test_index.max() < len(data.test_labels)
        assert c.train_labels.min() >= 0 and c.train_labels.max() < outputs
        assert c.test_labels.min() >= 0 and c.test_labels.max() < outputs
    assert _same(chunks, protocol.split(data, 4, seed=0))
    assert _same(chunks, protocol.split(data, 4, seed=1)) == (name == "online")
    assert _same(chunks, protocol.stream(data, 4, "limited", seed=0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [0, -3, 7])
def test_impossible_chunk_counts_are_refused(name: str, chunks: int, data: ImageData) -> None:
    data = _data(name, data)
    if name in ("shuffle", "permuted", "warmstart", "domains", "online", "pairs") and chunks == 7:
        assert len(_make(name).split(data, chunks, 0)) == 7
        return
    with pytest.raises(UserError, match=f"{chunks} chunks .*use --chunks [0-9]"):
        _make(name).split(data, chunks, 0)


def test_refusal_names_divisors_nearby(data: ImageData) -> None:
    with pytest.raises(UserError, match=r"7 chunks do not divide 12 classes; .* 4, 6$"):
        _make("class").split(data, 7, 0)
    full = registry.get("protocol", "class").Config(head="full").build()
    with pytest.raises(UserError, match=r"7 chunks do not divide 12 classes; .* 4, 6, 12$"):
        full.split(data, 7, 0)
    labels = {"train_labels": data.train_labels % 3, "test_labels": data.test_labels % 3}
    three = replace(data, num_classes=3, **labels)
    with pytest.raises(UserError, match=r"5 chunks do not divide 3 classes; use --protocol shuf"):
        _make("class").split(three, 5, 0)
    with pytest.raises(UserError, match=r"7 chunks do not divide 240 training .* 5, 6, 8, 10$"):
        _make("iid").split(data, 7, 0)


def test_a_class_a_task_leaves_a_shared_head_nothing_to_tell_apart(data: ImageData) -> None:
    with pytest.raises(UserError, match="12 chunks of 12 classes have one class each.* shuffle"):
        _make("class").split(data, 12, 0)
    full = registry.get("protocol", "class").Config(head="full").build()
    assert len(full.split(data, 12, 0)) == 12


def test_negative_seed_is_refused(data: ImageData) -> None:
    with pytest.raises(UserError, match="seed -1 is negative"):
        _make("iid").split(data, 4, -1)


@pytest.mark.parametrize("name", ["iid", "noise"])
def test_iid_parts_cover_the_data_in_balance(name: str, data: ImageData) -> None:
    chunks = _make(name).split(data, 5, 3)
    every = torch.cat([c.train_index for c in chunks])
    assert every.sort().values.equal(torch.arange(240))
    for c in chunks:
        assert data.train_labels[c.train_index].bincount(minlength=12).tolist() == [4] * 12
        assert c.test_index.equal(torch.arange(60)) and c.test_labels.equal(data.test_labels)


def test_iid_parts_of_unequal_classes_differ_by_one(data: ImageData) -> None:
    chunks = _make("iid").split(data, 6, 0)  # 20 images of a class in 6 parts: 3 or 4
    counts = torch.stack([c.train_labels.bincount(minlength=12) for c in chunks])
    assert counts.sum(1).tolist() == [40] * 6 and set(counts.unique().tolist()) == {3, 4}


def test_iid_is_clean_and_shuffled(data: ImageData) -> None:
    for c in _make("iid").split(data, 5, 0):
        assert c.train_labels.equal(data.train_labels[c.train_index])
        assert not c.train_labels.equal(c.train_labels.sort().values)


@pytest.mark.parametrize("head", ["shared", "full"])
def test_class_chunks_are_disjoint_and_cover_the_classes(head: str, data: ImageData) -> None:
    protocol = _make("class", head=head)
    chunks = protocol.split(data, 4, 0)
    assert protocol.num_outputs(data, 4) == (3 if head == "shared" else 12)
    seen: list[int] = []
    for c in chunks:
        true = data.train_labels[c.train_index]
        classes = true.unique().tolist()
        assert len(classes) == 3 and len(true) == 60
        assert data.test_labels[c.test_index].unique().tolist() == classes
        pairs = set(zip(true.tolist(), c.train_labels.tolist(), strict=True))
        test = data.test_labels[c.test_index].tolist()
        assert pairs == set(zip(test, c.test_labels.tolist(), strict=True))
        if head == "full":
            assert all(a == b for a, b in pairs)
        else:
            assert len(pairs) == 3 and {b for _, b in pairs} == {0, 1, 2}
        seen += classes
    assert sorted(seen) == list(range(12)) and seen != list(range(12))


def test_noise_has_the_schedule_s_share_and_iid_s_images() -> None:
    g = torch.Generator().manual_seed(1)
    n = 10_000
    images = torch.zeros(n, 1, 1, 1, dtype=torch.uint8)
    labels = torch.randint(20, (n,), generator=g)
    data = ImageData("flat", images, labels, images[:9], labels[:9], 20)
    chunks = _make("noise").split(data, 10, 0)
    clean = _make("iid").split(data, 10, 0)
    hits = [c.train_labels != i.train_labels for c, i in zip(chunks, clean, strict=True)]
    assert (hits[1] & hits[2]).float().mean() < 0.25  # independent: .38^2 = .14, not .38
    schedule = [0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0]
    for c, i, share in zip(chunks, clean, schedule, strict=True):
        assert c.train_index.equal(i.train_index)
        wrong = (c.train_labels != i.train_labels).sum().item()
        assert wrong <= round(share * 1000)  # exactly that many were drawn, 1 in 20 came out right
        assert abs(wrong / 1000 - share * 0.95) <= 0.03
        changed = c.train_labels[c.train_labels != i.train_labels]
        assert share == 0 or len(changed.unique()) == 20


def test_noise_schedules(data: ImageData) -> None:
    protocol: Any = _make("noise")
    assert protocol.shares(1) == [0.5]
    assert protocol.shares(2) == [0.5, 0.0]
    assert (
        protocol.shares(19)[:3] == pytest.approx([0.5, 0.45, 0.4])
        and len(protocol.shares(19)) == 19
    )
    full = _make("noise", schedule=(0.0, 1.0)).split(data, 2, 0)
    assert full[0].train_labels.equal(data.train_labels[full[0].train_index])
    assert not full[1].train_labels.equal(data.train_labels[full[1].train_index])
    with pytest.raises(UserError, match="schedule has 2 shares for 4 chunks"):
        _make("noise", schedule=(0.1, 0.0)).split(data, 4, 0)
    with pytest.raises(UserError, match="schedule has 1.5; shares lie in 0 .. 1"):
        _make("noise", schedule=(1.5,))


def test_shuffle_keeps_images_and_redraws_labels(data: ImageData) -> None:
    chunks = _make("shuffle", images=200, classes=5).split(data, 3, 0)
    for c in chunks:
        assert c.train_index.equal(chunks[0].train_index) and len(c.train_index) == 200
        assert c.test_index.equal(chunks[0].test_index) and len(c.test_index) == 60
        assert c.train_labels.bincount(minlength=5).min() >= 20  # uniform: 40 +- 6
    for a, b in ((0, 1), (1, 2), (0, 2)):
        agree = (chunks[a].train_labels == chunks[b].train_labels).float().mean()
        assert 0.08 < agree < 0.35  # chance .2
        assert not chunks[a].test_labels.equal(chunks[b].test_labels)


def test_shuffle_refuses_options_that_cannot_work(data: ImageData) -> None:
    with pytest.raises(UserError, match="images 241 is more than the 240 .*--protocol.images 240"):
        _make("shuffle", images=241).split(data, 2, 0)
    with pytest.raises(UserError, match="images 0 is too small"):
        _make("shuffle", images=0)
    with pytest.raises(UserError, match="classes 1 is too small"):
        _make("shuffle", classes=1)


@pytest.mark.parametrize("name", ["iid", "noise"])
def test_cumulative_chunks_hold_all_before_them(name: str, data: ImageData) -> None:
    parts = _make(name).split(data, 4, 0)
    joined = _make(name).stream(data, 4, "cumulative", 0)
    assert [len(c.train_index) for c in joined] == [60, 120, 180, 240]
    assert joined[2].train_index.equal(torch.cat([p.train_index for p in parts[:3]]))
    assert joined[2].train_labels.equal(torch.cat([p.train_labels for p in parts[:3]]))
    assert all(c.test_index.equal(torch.arange(60)) for c in joined)


def test_cumulative_classes_need_the_full_head(data: ImageData) -> None:
    joined = _make("class", head="full").stream(data, 4, "cumulative", 0)
    assert [len(c.train_labels.unique()) for c in joined] == [3, 6, 9, 12]
    assert [len(c.test_index) for c in joined] == [15, 30, 45, 60]
    with pytest.raises(UserError, match="--protocol.head full or --access limited"):
        _make("class").stream(data, 4, "cumulative", 0)
    with pytest.raises(UserError, match="shuffle .*--access limited"):
        _make("shuffle").stream(data, 4, "cumulative", 0)


def test_cumulative_refuses_contradictory_labels(data: ImageData) -> None:
    with pytest.raises(ValueError, match="different labels"):
        cumulative(_make("shuffle").split(data, 2, 0))

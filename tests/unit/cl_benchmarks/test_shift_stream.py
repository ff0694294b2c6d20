"""Streams: every image once, in the order that was asked for, at any position."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_benchmarks.shifts.domain import CORRUPTIONS, Domain, Memory, check
from cl_benchmarks.shifts.stream import (
    GRADUAL,
    STREAMS,
    Segment,
    ShiftSource,
    Stream,
    domains_of,
    make_stream,
)
from dynmoe.errors import UserError

EACH = 20


class Marked(ShiftSource):
    """Image i of a domain: pixel 0 says i, pixel 1 the severity."""

    name, num_classes, size = "marked", 10, 2
    mean = std = (0.5, 0.5, 0.5)

    def corrupted(self, corruption: str, severity: int) -> Domain:
        check(corruption, severity)
        images = torch.zeros(EACH, 3, 2, 2, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(EACH)
        images[:, 0, 0, 1] = severity
        return Memory(corruption, images, torch.arange(EACH) % 10)

    def other(self, shift: str) -> Domain:
        images = self.corrupted("fog", 1).images(range(EACH))
        return Memory(shift, images, torch.arange(EACH) % 10)


def shown(stream: Stream) -> list[tuple[str, int, int]]:
    """(domain, image, severity) in order; checks the labels."""
    rows = []
    for number in range(len(stream)):
        batch = stream.batch(number)
        marks: Tensor = batch.images[:, 0, 0]
        assert torch.equal(batch.labels, marks[:, 0].long() % 10)
        for domain, (index, severity) in zip(batch.domains, marks.tolist(), strict=True):
            rows.append((stream.names[int(domain)], index, severity))
    return rows


def test_the_published_streams() -> None:
    assert len(CORRUPTIONS) == 15
    sizes = {name: len(domains) for name, domains in STREAMS.items()}
    assert (sizes["classical"], sizes["potpourri"], sizes["potpourri+"]) == (15, 18, 19)
    assert sizes["validation"] == 4 and sizes["clean"] == 1


@pytest.mark.parametrize("order", ["mixed", "sequential", "gradual"])
@pytest.mark.parametrize("name", ["classical", "potpourri+", "sketch"])
def test_every_image_once(name: str, order: str) -> None:
    stream = make_stream(Marked(), name, order, batch_size=7, seed=3)  # type: ignore[arg-type]
    rows = shown(stream)
    assert len(rows) == stream.num_images == EACH * len(STREAMS[name])
    assert Counter((d, i) for d, i, _ in rows) == {
        (d, i): 1 for d in STREAMS[name] for i in range(EACH)
    }
    if order != "gradual":
        assert {s for d, _, s in rows if d in CORRUPTIONS} <= {5}


def test_mixed_mixes_and_sequential_does_not() -> None:
    mixed = make_stream(Marked(), "classical", "mixed", batch_size=50)
    assert len(mixed.batch(0).domains.unique()) > 8
    sequential = make_stream(Marked(), "classical", "sequential", batch_size=8)
    assert len(sequential) == 15 * 3
    domains = [sequential.batch(n).domains.unique().tolist() for n in range(45)]
    assert domains == [[n // 3] for n in range(45)]
    assert [i for _, i, _ in shown(sequential)[:EACH]] != list(range(EACH))


def test_gradual_severity_rises_and_falls() -> None:
    stream = make_stream(Marked(), "potpourri", "gradual", batch_size=64)
    rows = [(d, s) for d, _, s in shown(stream)]
    fog = [s for d, s in rows if d == "fog"]
    steps = [s for i, s in enumerate(fog) if i == 0 or fog[i - 1] != s]
    assert steps == list(GRADUAL)
    assert list(dict.fromkeys(d for d, _ in rows)) == list(STREAMS["potpourri"])


@settings(max_examples=20, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(["mixed", "sequential"]))
def test_any_batch_alone(batch_size: int, seed: int, order: str) -> None:
    make = lambda: make_stream(Marked(), "classical", order, 5, batch_size, seed, 6)  # type: ignore[arg-type] # noqa: E731
    whole = make()
    number = seed % len(whole)
    for n in range(number):
        whole.batch(n)
    late, alone = whole.batch(number), make().batch(number)
    assert torch.equal(late.images, alone.images) and torch.equal(late.domains, alone.domains)
    assert len(late.labels) == batch_size or number == len(whole) - 1 or order == "sequential"


def test_the_seed_decides_choice_and_order() -> None:
    def rows(seed: int) -> list[tuple[str, int, int]]:
        return shown(make_stream(Marked(), "classical", seed=seed, limit=5))

    assert rows(1) == rows(1) and rows(1) != rows(2)
    assert Counter(d for d, _, _ in rows(1)) == dict.fromkeys(CORRUPTIONS, 5)
    assert {i for d, i, _ in rows(1) if d == "fog"} != {i for d, i, _ in rows(2) if d == "fog"}


def test_bad_input() -> None:
    source = Marked()
    with pytest.raises(UserError, match="unknown stream 'classic'.*'classical'"):
        make_stream(source, "classic")
    with pytest.raises(UserError, match="unknown order 'random'"):
        make_stream(source, "classical", "random")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch size 0"):
        make_stream(source, "classical", batch_size=0)
    with pytest.raises(UserError, match="limit 0"):
        make_stream(source, "classical", limit=0)
    with pytest.raises(UserError, match="severity 7"):
        make_stream(source, "classical", severity=7)
    empty = Segment(source.other("clean"), torch.arange(0))
    with pytest.raises(UserError, match="holds no image"):
        Stream([empty], "mixed", 4, 0)


class Uneven(Marked):
    """Of severity 3 there is an image less."""

    def corrupted(self, corruption: str, severity: int) -> Domain:
        whole = super().corrupted(corruption, severity)
        count = EACH - (severity == 3)
        return Memory(corruption, whole.images(range(count)), whole.labels[:count])


def test_severities_with_other_numbers_of_images_are_for_other_orders() -> None:
    assert make_stream(Uneven(), "fog", "mixed", severity=3).num_images == EACH - 1
    with pytest.raises(UserError, match="20 at severity 2, 19 at severity 3, 20 at severity 4"):
        make_stream(Uneven(), "fog", "gradual")


def test_a_stream_of_chosen_domains() -> None:
    assert domains_of("fog+clean") == ("fog", "clean") and domains_of("fog") == ("fog",)
    assert domains_of("classical+") == (*CORRUPTIONS, "clean")
    rows = shown(make_stream(Marked(), "fog+sketch"))
    assert Counter(d for d, _, _ in rows) == {"fog": EACH, "sketch": EACH}
    for name, message in {"fogg": "unknown stream 'fogg'", "fog+snoww": "'snow'",
                          "fog+fog": "twice", "fog+": "unknown domain"}.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            make_stream(Marked(), name)

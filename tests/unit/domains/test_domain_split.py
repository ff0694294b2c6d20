"""DomainBed's splits, bit for bit, and batches that need no memory of what came before."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_benchmarks.domain_set import batch_indices, seed_hash, split


@pytest.mark.parametrize(("trial", "domain"), [(0, 0), (0, 3), (2, 1)])
def test_the_seed_is_md5_of_the_tuples_text(trial: int, domain: int) -> None:
    text = f"({trial}, {domain})".encode()
    assert seed_hash(trial, domain) == int(hashlib.md5(text).hexdigest(), 16) % 2**31


def test_known_seeds() -> None:
    """From the reference computation above, written down: a change of either would show."""
    assert [seed_hash(0, 0), seed_hash(0, 1), seed_hash(1, 0)] == [894182419, 1514274641, 785910682]


@pytest.mark.parametrize("count", [5, 9, 2048])
def test_a_fifth_is_held_out_as_domainbed_does(count: int) -> None:
    keys = np.arange(count)
    np.random.RandomState(seed_hash(1, 2)).shuffle(keys)
    train, out = split(count, 1, 2)
    assert out.tolist() == keys[: int(0.2 * count)].tolist()
    assert train.tolist() == keys[int(0.2 * count) :].tolist()


def test_numpys_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    split(50, 0, 0)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_batches_are_drawn_with_replacement() -> None:
    """Each image is drawn independently: repeats are as many as 10 draws of 10 have, 3.49."""
    indices = torch.arange(100, 110)
    batches = torch.stack([batch_indices(indices, 10, step, 0, domain=1) for step in range(2000)])
    repeats = [10 - len(set(batch)) for batch in batches.tolist()]
    assert sum(repeats) / len(repeats) == pytest.approx(10 * 0.9**10, abs=0.08)
    counts = torch.bincount(batches.flatten() - 100, minlength=10)
    assert counts.sum() == 20000 and (counts - 2000).abs().max() < 200
    neighbours = (batches[1:] == batches[:-1]).double().mean()
    assert neighbours == pytest.approx(0.1, abs=0.01)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_batches_are_full_also_of_small_domains(count: int, size: int, seed: int) -> None:
    indices = torch.arange(100, 100 + count)
    batch = batch_indices(indices, size, 7, seed, domain=1)
    assert len(batch) == size and set(batch.tolist()) <= set(indices.tolist())
    assert torch.equal(batch, batch_indices(indices, size, 7, seed, domain=1))


def test_batches_depend_on_seed_domain_and_step() -> None:
    indices = torch.arange(64)

    def take(step: int, seed: int, domain: int) -> list[int]:
        return batch_indices(indices, 16, step, seed, domain).tolist()

    first = take(0, 0, 0)
    assert first == take(0, 0, 0)
    for other in (take(1, 0, 0), take(0, 1, 0), take(0, 0, 1), take(4, 0, 0)):
        assert other != first

"""One seed, many independent streams, the same in every process and after a restore."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

from dynmoe.seeding import (
    derive,
    generator,
    global_state,
    kept,
    load_global_state,
    seed_global,
    seeded,
)

ROOT = Path(__file__).parents[2]


def test_derived_seeds_are_fixed_and_distinct() -> None:
    """The numbers are part of every published run: they must never change."""
    assert derive(0, "batches", 1, 2) == 772108500725406446
    seeds = [derive(s, k, n) for s, k, n in product(range(50), ("a", "b"), range(50))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, "a", 23) != derive(12, "a", 3) != derive(1, "a2", 3)


def test_same_in_another_process() -> None:
    code = "from dynmoe.seeding import derive; print(derive(3, 'x', 1), derive(-1), derive(2**70))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(derive(3, "x", 1)), str(derive(-1)), str(derive(2**70))]


def test_generators_and_seeded_leave_the_global_one_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = generator(0, "a"), generator(0, "b")
    assert a.initial_seed() == derive(0, "a")
    assert not torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
    with seeded(0, "network"):
        first = torch.rand(4)
    with seeded(0, "network"):
        assert torch.equal(first, torch.rand(4))
    with seeded(1, "network"):
        assert not torch.equal(first, torch.rand(4))
    assert torch.equal(torch.get_rng_state(), before)


def _draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_global_state_through_a_checkpoint_file() -> None:
    """Saved in the middle of a pair of normal numbers, which python and numpy draw by twos."""
    seed_global(3)
    first = _draws()
    buffer = io.BytesIO()
    torch.save(global_state(), buffer)
    expected = [_draws() for _ in range(3)]
    seed_global(4)
    assert _draws() != first
    buffer.seek(0)
    load_global_state(torch.load(buffer, weights_only=True))
    assert [_draws() for _ in range(3)] == expected
    seed_global(3)
    assert _draws() == first


def test_kept_leaves_the_global_generators_as_they_were() -> None:
    seed_global(3)
    before = global_state()
    with kept():
        random.random()
        np.random.rand()
        torch.rand(1)
        assert global_state()["python"] != before["python"]
    after = global_state()
    assert after["python"] == before["python"]
    assert torch.equal(after["torch"], before["torch"])
    assert torch.equal(after["numpy"][1], before["numpy"][1])
    assert after["numpy"][2:] == before["numpy"][2:]

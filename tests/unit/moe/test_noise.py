"""The noise of forward passes: which numbers are drawn, and how they are distributed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe.moe.draws import GOLDEN, Noise, scramble

WORD = 2**64


def make_noise(seed: int = 0) -> Noise:
    return Noise(torch.Generator().manual_seed(seed))


def split_mix(seed: int, index: int) -> int:
    """Output `index` (1 is the first) of SplitMix64, in Python's whole numbers."""
    z = (seed + index * 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def test_scramble_gives_the_published_sequence():
    """The first numbers of SplitMix64 from seed 1234567, as its reference code prints them."""
    z = scramble(1234567 + torch.arange(1, 4) * GOLDEN)
    assert [v % WORD for v in z.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def numbers(seed: int, step: int, draw: int, count: int) -> list[float]:
    """Uniform numbers of one draw: hashes of seed, optimizer step, draw and place."""
    key = split_mix(split_mix(seed, step), draw)
    return [((split_mix(key, i) >> 41) + 0.5) * 2.0**-23 for i in range(1, count + 1)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_draws_are_hashes_of_seed_step_and_draw(seed, counts):
    noise = make_noise(seed)
    for step in range(2):
        for draw, count in enumerate(counts):
            with torch.no_grad():  # acting leaves the numbers of training alone
                acting = noise.uniform(torch.empty(count, dtype=torch.double))
            learning = noise.uniform(torch.empty(count, dtype=torch.double))
            assert learning.tolist() == numbers(int(noise.seed), step, draw, count)
            assert acting.tolist() == numbers(int(noise.seed), step, draw + 2**40, count)
        noise.finish_step()
    noise.finish_step()  # without a draw it changes nothing
    assert noise.step.item() == 2 and not noise.drawn.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_numbers_have_their_moments(dtype, device):
    noise, like = make_noise().to(device), torch.empty(400, 500, dtype=dtype, device=device)
    uniform, normal = noise.uniform(like), noise.normal(like)
    assert uniform.shape == like.shape and uniform.dtype == normal.dtype == dtype
    assert uniform.min() > 0 and uniform.max() < 1 and normal.isfinite().all()
    moments = [uniform.mean(), uniform.var() * 12, normal.mean() + 1, normal.var()]
    torch.testing.assert_close(
        torch.stack(moments).cpu(), torch.tensor([0.5, 1, 1, 1], dtype=dtype), rtol=0, atol=0.01
    )
    torch.testing.assert_close(normal.pow(4).mean().item(), 3.0, rtol=0.02, atol=0)
    for shift in (1, 500):  # along a row and a column
        numbers = normal.flatten()
        assert (numbers[shift:] * numbers[:-shift]).mean().abs() < 0.01


def test_a_copy_and_a_loaded_source_go_on_alike_and_others_differ():
    noise, like = make_noise(), torch.empty(50)
    noise.uniform(like)
    noise.finish_step()
    twin, loaded = copy.deepcopy(noise), make_noise(1)
    assert not torch.equal(make_noise(1).uniform(like), make_noise(0).uniform(like))
    loaded.load_state_dict(noise.state_dict())
    expected = noise.normal(like)
    assert torch.equal(twin.normal(like), expected) and torch.equal(loaded.normal(like), expected)
    assert not torch.equal(noise.normal(like), expected)

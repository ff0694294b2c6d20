"""The first convolution from tile responses, against the dense one, with its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents import tiles
from agents.actor_critic import ActorCritic, learning
from agents.encoders import Conv
from agents.tiles import TiledConvolution, distinct_tiles
from dynmoe.errors import UserError
from dynmoe.interventions.units import find_units

SIZES = {10: (130, 110), 7: (63, 63), 4: (36, 40)}


def frames(side: int, count: int = 6, noisy: int = 0, kinds: int = 9) -> Tensor:
    """Frames of `kinds` tiles, each lit otherwise; `noisy` of them without any repetition."""
    height, width = SIZES[side]
    made = torch.randint(256, (kinds, side, side, 3))
    ids = torch.randint(kinds, (count, height // side, width // side))
    light = torch.randint(1, 4, ids.shape)[..., None, None, None]
    grid = (made[ids] // light).transpose(2, 3).reshape(count, height, width, 3)
    grid[1 : 1 + noisy] = torch.randint(256, (noisy, height, width, 3))
    return grid.to(torch.uint8).permute(0, 3, 1, 2)


def restated(layer: TiledConvolution, x: Tensor) -> Tensor:
    """Convolution and pooling in torch's own words."""
    scaled = x.to(layer.weight.dtype) / 255
    return F.max_pool2d(F.conv2d(scaled, layer.weight, layer.bias, padding=2), 3)


def gradients(layer: TiledConvolution, out: Tensor, towards: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * towards).sum(), list(layer.parameters())))


def is_the_dense_one(layer: TiledConvolution, x: Tensor) -> None:
    """A layer in float64, its outputs and its gradient."""
    out, dense = layer(x), restated(layer, x)
    assert (out - dense).abs().max() < 1e-9
    towards = torch.randn_like(dense)
    for mine, theirs in zip(
        gradients(layer, out, towards), gradients(layer, dense, towards), strict=True
    ):
        assert (mine - theirs).abs().max() < 1e-9 * theirs.abs().max()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("noisy", [0, 2], ids=["tiles", "noise"])
@pytest.mark.parametrize("side", SIZES)
def test_forward_and_gradient_are_the_dense_ones(side: int, noisy: int) -> None:
    layer = TiledConvolution(3, 8, side).double()
    x = frames(side, noisy=noisy)
    is_the_dense_one(layer, x)


@pytest.mark.parametrize(("side", "status"), [(10, 4), (7, 2), (7, 3), (7, 5), (4, 3), (4, 1)])
def test_noise_above_a_status_that_repeats(side: int, status: int) -> None:
    layer = TiledConvolution(3, 8, side).double()
    x = frames(side, count=8, kinds=2)
    top = x.shape[2] - status * side
    x[1:5, :, :top] = torch.randint(256, (4, 3, top, x.shape[3])).to(torch.uint8)
    *_, repeated, below = distinct_tiles(x, side)
    assert repeated.tolist() == [True, *[status * side > x.shape[2] / 2] * 4, True, True, True]
    assert repeated.all() or below == status
    is_the_dense_one(layer, x)


@pytest.mark.parametrize("noisy", [slice(1, 5), slice(8)], ids=["some", "all"])
def test_of_a_noisy_frame_only_the_noise_is_convolved(
    monkeypatch: pytest.MonkeyPatch, noisy: slice
) -> None:
    layer, x, seen = TiledConvolution(3, 8, 10).double(), frames(10, count=8, kinds=2), []
    x[noisy, :, :90] = torch.randint(256, x[noisy, :, :90].shape).to(torch.uint8)
    dense = layer.dense
    monkeypatch.setattr(layer, "dense", lambda part: (seen.append(part.shape), dense(part))[1])
    is_the_dense_one(layer, x)
    assert seen == [(len(x[noisy]), 3, 95, 110)]  # 90 rows, to a window's end, and 2 beyond


def test_float32_and_two_threads_round_alone() -> None:
    layer, x = TiledConvolution(3, 32, 10), frames(10, 16)
    towards = torch.randn(16, 32, 43, 36)
    exact = TiledConvolution(3, 32, 10).double()
    exact.load_state_dict(layer.state_dict())
    wanted = [restated(exact, x), *gradients(exact, restated(exact, x), towards.double())]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = layer(x)
            for mine, theirs in zip([out, *gradients(layer, out, towards)], wanted, strict=True):
                assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
    finally:
        torch.set_num_threads(before)


def test_tiles_are_found_by_their_pixels() -> None:
    x = frames(7, noisy=1)
    ids, found, repeated, below = distinct_tiles(x, 7)
    assert below == 0
    assert repeated.tolist() == [True, False, True, True, True, True]
    assert len(found) <= 27 and len({tuple(t.flatten().tolist()) for t in found}) == len(found)
    rebuilt = found[ids.long()].permute(0, 3, 1, 4, 2, 5).reshape(5, 3, 63, 63)
    assert torch.equal(rebuilt, x[repeated])


def test_tiles_that_share_a_hash_take_the_dense_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tiles, "_weights", lambda rows, wide: torch.zeros(rows, wide).int().numpy().view("uint32")
    )
    layer, x = TiledConvolution(3, 4, 7).double(), frames(7)
    assert torch.equal(layer(x), restated(layer, x))


@pytest.mark.parametrize("noisy", [0, 6], ids=["tiles", "noise"])
def test_bfloat16_stays_as_near_as_the_dense_pass(noisy: int) -> None:
    layer, x = TiledConvolution(3, 8, 7), frames(7, 8, noisy)
    with torch.no_grad():
        wanted = restated(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            out, dense = layer(x).float(), layer.dense(x).float()
    assert (out - wanted).abs().mean() < 1.5 * (dense - wanted).abs().mean()


def test_policy_is_the_same_with_tiles() -> None:
    x = frames(7)
    plain, tiled = (ActorCritic(Conv.Config(hidden=16, tile=t), (3, 63, 63), 5) for t in (0, 7))
    tiled.load_state_dict(plain.state_dict())  # checkpoints fit
    with learning(plain), learning(tiled):
        ours, theirs = tiled(x), plain(x)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    floats = tiled.trunk(x.float() / 255)  # what probes give it
    torch.testing.assert_close(floats, plain.trunk(x.float() / 255))


def test_interventions_find_its_units() -> None:
    def units(tile: int) -> list[tuple[str, type[nn.Module] | None, int]]:
        policy = ActorCritic(Conv.Config(hidden=16, tile=tile), (3, 63, 63), 5)
        found = find_units(policy)
        return [(u.name, type(u.activation), u.units) for u in found]

    assert units(7) == units(0)


def test_tiles_that_do_not_fill_the_frame_are_refused() -> None:
    with pytest.raises(UserError, match=r"tile=9 does not suit frames of 130x110"):
        Conv.Config(tile=9).build((3, 130, 110))

"""All encoders on all kinds of observations, and each one's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.actor_critic import ActorCritic
from agents.encoders import Encoder, orthogonal
from dynmoe import registry
from dynmoe.errors import UserError

NAMES = registry.names("encoder")
CLASSIC, FULL = (3, 63, 63), (3, 130, 110)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def encoder(name: str, shape: tuple[int, ...], **options: Any) -> Encoder:
    return registry.get("encoder", name).Config(**options).build(shape)


def frames(shape: tuple[int, ...], count: int = 2) -> Tensor:
    return torch.rand(count, *shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [CLASSIC, FULL, (1, 64, 64), (4, 84, 70)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_encoder_reads_frames(name: str, shape: tuple[int, ...]) -> None:
    options = {"tile": 8} if name == "patch" and shape[1] == 64 else {}
    module = encoder(name, shape, **options)
    features = module(frames(shape))
    assert features.shape == (2, module.out_features) and torch.isfinite(features).all()
    features.square().sum().backward()
    for parameter_name, p in module.named_parameters():
        assert p.grad is not None and bool(p.grad.any()), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_mix(name: str) -> None:
    module, x = encoder(name, CLASSIC), frames(CLASSIC, 3)
    together = module(x)
    for one, row in zip(x, together, strict=True):
        torch.testing.assert_close(module(one.unsqueeze(0))[0], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_finite_and_near(name: str) -> None:
    config = registry.get("encoder", name).Config()
    policy = ActorCritic(config, CLASSIC, 17).to(memory_format=torch.channels_last)
    x = (255 * frames(CLASSIC)).to(torch.uint8)
    exact = policy(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy(x)
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32 and torch.isfinite(other).all()
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)
    sum(part.square().sum() for part in rough).backward()
    for p in policy.parameters():
        assert p.grad is not None and p.dtype == p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_start_orthogonal_and_biases_at_0(name: str) -> None:
    gain = 2.0
    for module in encoder(name, CLASSIC).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            w = module.weight.detach().flatten(1)
            gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            torch.testing.assert_close(gram, gain * torch.eye(len(gram)), rtol=1e-4, atol=1e-4)
            assert module.bias is not None and not module.bias.any()
    tail: Any = orthogonal(nn.Linear(4, 4, bias=False), 0.01)
    torch.testing.assert_close(tail.weight.norm(), torch.tensor(0.02))


# ---------------------------------------------------------------- bad shapes and options


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mlp"])
@pytest.mark.parametrize("shape", [(8,), (3, 6, 100), (3, 100, 4), (3, 1, 1)], ids=str)
def test_observations_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as caught:
        encoder(name, shape)
    message = str(caught.value)
    assert message.startswith(f"encoder {name}: ") and "use --encoder mlp" in message
    assert "\n" not in message
    size = f"{shape[1]}x{shape[2]}" if len(shape) == 3 else str(shape)
    assert size in message


@pytest.mark.parametrize(
    ("name", "least"), [("conv", 27), ("impala", 8), ("nature", 36), ("patch", 7)]
)
def test_the_smallest_frame_is_read_and_none_smaller(name: str, least: int) -> None:
    assert encoder(name, (3, least, least))(frames((3, least, least))).shape[1] > 0
    with pytest.raises(UserError, match=f"{least - 1}x{least}, it needs {least}x{least} or more"):
        encoder(name, (3, least - 1, least))


@pytest.mark.parametrize(
    ("shape", "tile"), [((3, 64, 64), 0), (CLASSIC, -1), (CLASSIC, 64), (CLASSIC, 8)], ids=str
)
def test_tiles_that_do_not_fit_are_refused(shape: tuple[int, ...], tile: int) -> None:
    with pytest.raises(UserError, match=rf"tile={tile} does not suit frames of {shape[1]}x"):
        encoder("patch", shape, tile=tile)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("conv", {"channels": 0}),
        ("impala", {"channels": (16, 0)}),
        ("impala", {"blocks": -1}),
        ("mlp", {"widths": (32, 0)}),
        ("patch", {"channels": -2}),
        ("patch", {"mixed": 0}),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(UserError, match=f"encoder {name}: {option}="):
        encoder(name, CLASSIC, **options)


# ---------------------------------------------------------------- each one's arithmetic


@pytest.mark.parametrize(("shape", "features"), [(FULL, 512), (CLASSIC, 128)], ids=str)
def test_conv_is_the_baselines_network(shape: tuple[int, ...], features: int) -> None:
    """There the ReLU comes before the pooling, which changes no value."""
    module, x = encoder("conv", shape), frames(shape)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    y = x
    for convolution in convolutions:
        y = F.max_pool2d(convolution(y).clamp_min(0), 3, stride=3)
    assert module.out_features == features and len(convolutions) == 3
    torch.testing.assert_close(module(x), y.flatten(1))
    assert [tuple(c.weight.shape) for c in convolutions] == [
        (32, 3, 5, 5), (32, 32, 5, 5), (32, 32, 5, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(("shape", "tiles"), [(FULL, 13 * 11), (CLASSIC, 81)], ids=str)
def test_patch_reads_tile_by_tile(shape: tuple[int, ...], tiles: int) -> None:
    """A tile's features depend on the tile and its eight neighbours alone."""
    module, x = encoder("patch", shape), frames(shape, 1)
    assert module.out_features == 32 * tiles
    tile = 10 if shape == FULL else 7
    columns = shape[2] // tile
    other = x.clone()
    other[:, :, 4 * tile : 5 * tile, 3 * tile : 4 * tile] = 0
    moved = (module(x) != module(other)).view(32, -1, columns).any(dim=0)
    rows = moved.nonzero()
    assert rows.min(dim=0).values.tolist() == [3, 2] and rows.max(dim=0).values.tolist() == [5, 4]
    assert encoder("patch", shape, tile=tile).out_features == module.out_features


def test_mlp_on_vectors_and_flattened_frames() -> None:
    module, x = encoder("mlp", (5,), widths=(7, 4)), torch.randn(3, 5)
    first, second = (m for m in module.modules() if isinstance(m, nn.Linear))
    expected = ((x @ first.weight.T + first.bias).tanh() @ second.weight.T + second.bias).tanh()
    torch.testing.assert_close(module(x), expected)
    assert module.out_features == 4
    image: Any = encoder("mlp", CLASSIC)
    x = frames(CLASSIC)
    torch.testing.assert_close(image(x), image.layers[1:](x.contiguous().flatten(1)))
    assert encoder("mlp", (5,), widths=()).out_features == 5


def test_nature_and_impala_are_the_published_networks() -> None:
    """DQN's has 3136 features on 84x84 (Mnih et al. 2015), IMPALA's 15 layers (without LSTM)."""
    assert encoder("nature", (4, 84, 84)).out_features == 3136
    module = encoder("impala", (3, 72, 96), blocks=2)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 15 and module.out_features == 32 * 9 * 12
    assert [c.out_channels for c in convolutions] == [16] * 5 + [32] * 10
    small = encoder("impala", (3, 72, 96))
    assert len([m for m in small.modules() if isinstance(m, nn.Conv2d)]) == 9


def test_impalas_residuals_add() -> None:
    from agents.encoders import Residual

    block, x = Residual(4), torch.randn(2, 4, 6, 6)
    first, second = (m for m in block.modules() if isinstance(m, nn.Conv2d))
    expected = x + F.conv2d(
        F.conv2d(x.clamp_min(0), first.weight, first.bias, padding=1).clamp_min(0),
        second.weight, second.bias, padding=1,
    )  # fmt: skip
    torch.testing.assert_close(block(x), expected)
    assert (block(x) - x).abs().max() > 0.1

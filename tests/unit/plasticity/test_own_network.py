"""Plasticity of networks that are not ours, against restatements; the callbacks that log it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import NumericError, UserError
from dynmoe.moe import MoELayer
from dynmoe.plasticity import PlasticityCallback, measure_all, measure_plasticity, take_probe

LABELS = torch.arange(12) % 5


class Mlp(nn.Module):
    """relu(x W + b) as a function; two units are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.first.bias[:2] = -100

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


class Block(nn.Module):
    """A residual block with a path that depends on data, which no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x)) * F.softplus(self.scale)  # of a parameter: no units
        return F.gelu(out + x) if float(x.sum()) > -1e9 else out


class Cnn(nn.Module):
    """Three ways to call relu, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 4, 3, padding=1), Block()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv(x).relu_()).mean(dim=(2, 3))
        return self.head(torch.relu(self.hidden(x)))


def numbers(model: nn.Module, hidden: list[np.ndarray], features: np.ndarray, x: Tensor):
    """The figures restated: `hidden` are |activations| as [samples, units], in numpy."""
    activity = [np.abs(h).astype(np.float64).mean(axis=0) for h in hidden]
    scores = np.concatenate([a / (a.mean() + 1e-9) for a in activity])
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 1e-12]
    other = copy.deepcopy(model).eval()
    F.cross_entropy(other(x), LABELS).backward()
    gradients = [float(q.grad.double().square().sum()) for q in other.parameters()]
    weights = [float(q.detach().double().square().sum()) for q in other.parameters()]
    return {
        "units": len(scores),
        "dead_units": sum((a == 0).sum() for a in activity),
        "dormant/0": (scores <= 0).mean(),
        "dormant/0.1": (scores <= 0.1).mean(),
        "rank/effective_rank": np.exp(-(p * np.log(p)).sum()),
        "rank/stable_rank_fro": (sigma**2).sum() / sigma[0] ** 2,
        "rank/srank99": 1 + (np.cumsum(sigma) < 0.99 * sigma.sum()).sum(),
        "weight_norm/l2": sum(weights) ** 0.5,
        "grad_norm/l2": sum(gradients) ** 0.5,
    }


def test_an_mlp_with_a_functional_relu():
    model, x = Mlp(), torch.randn(12, 6)
    hidden = np.maximum(
        x.numpy() @ model.first.weight.detach().numpy().T + model.first.bias.detach().numpy(), 0
    )
    expected = numbers(model, [hidden], hidden, x)
    found = measure_plasticity(model, x, LABELS)
    assert expected["dead_units"] >= 2
    for tag, value in expected.items():
        assert found[tag] == pytest.approx(value, rel=1e-5), tag
    assert found["dormant/0/relu"] == found["dormant/0"]


def test_a_cnn_whose_path_depends_on_data():
    model, x = Cnn().eval(), torch.randn(12, 3, 8, 8)
    with torch.no_grad():
        model.conv.bias[1] = -100
        first = torch.clamp(model.conv(x), min=0)
        gelu = model.block(first)
        last = torch.clamp(model.hidden(gelu.mean(dim=(2, 3))), min=0)
    rows = [h.movedim(1, -1).reshape(-1, 4).numpy() for h in (first, gelu)]
    expected = numbers(model, [*rows, last.numpy()], last.numpy(), x)
    found = measure_plasticity(model.train(), x, LABELS)
    for tag, value in expected.items():
        assert found[tag] == pytest.approx(value, rel=1e-4), tag
    names = {tag.removeprefix("dormant/0/") for tag in found if tag.startswith("dormant/0/")}
    assert names == {"relu", "block.gelu", "relu#2"}
    assert found["dormant/0/relu"] >= 0.25


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_units_of_convolutions_are_their_channels(dim: int, functional: bool):
    conv, pool = getattr(nn, f"Conv{dim}d"), getattr(nn, f"AdaptiveAvgPool{dim}d")
    norm = getattr(nn, f"BatchNorm{dim}d")
    torch.manual_seed(0)
    layers = [conv(1, 6, 3), norm(6), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(6, 5)]
    with torch.no_grad():
        layers[1].bias[:2] = -100  # two channels are dead
    x = torch.randn(12, 1, *(9, 4, 3)[:dim])
    if functional:
        layers[2] = Relu()
    values = measure_plasticity(nn.Sequential(*layers), x, LABELS)
    assert values["units"] == 6 and values["dead_units"] == 2
    assert values["dormant/0"] == values["inactive_share"] == pytest.approx(2 / 6)


class Relu(nn.Module):
    """As a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Patches(nn.Module):
    """A convolution over time, its gate of half the channels, and tokens [N, T, 8] with one MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(1, 8, 3, padding=1), nn.Linear(4, 32)
        self.down, self.head = nn.Linear(32, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, dim=1)
        tokens = torch.tanh(first * torch.sigmoid(second)).transpose(1, 2)
        tokens = F.elu(tokens)  # no layer between: only its shape tells
        return self.head(self.down(F.gelu(self.up(tokens))).mean(dim=1))


def test_tokens_behind_a_convolution_over_time_have_their_units_last():
    values = take_probe(Patches(), torch.randn(12, 1, 9), LABELS, functional=True).activations
    shapes = {name: tuple(units.shape) for name, units in values.items()}
    assert shapes == {
        "sigmoid": (12, 4, 9, 1), "tanh": (12, 4, 9, 1), "elu": (12, 9, 4), "gelu": (12, 9, 32),
    }  # fmt: skip


def test_a_timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    ).eval()
    x, hidden = torch.randn(12, 3, 8, 8), []
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            after = tokens + block.attn(block.norm1(tokens))
            up = block.mlp.fc1(block.norm2(after)).double()
            hidden.append((up * (1 + torch.erf(up / 2**0.5)) / 2).reshape(-1, 64).numpy())
            tokens = block(tokens)
        features = model.norm(tokens)[:, 0].numpy()
    expected = numbers(model, hidden, features, x)
    assert expected["units"] == 128
    found = measure_plasticity(model, x, LABELS)
    for tag, value in expected.items():
        assert found[tag] == pytest.approx(value, rel=1e-4), tag


def test_torch_s_own_transformer_with_a_function_inside():
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)  # F.relu, fused in eval mode
    found = measure_plasticity(nn.Sequential(layer, nn.Linear(8, 5)), torch.randn(6, 7, 8))
    assert found["units"] == 32


def test_functions_within_experts_and_modules_count_once():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), MoELayer(16, 5, 20, num_experts=3))
    x = torch.randn(12, 6)
    found = measure_plasticity(net, x, LABELS)
    assert found["units"] == 36
    assert measure_all(take_probe(net, x, LABELS, classifier=net[2])).items() <= found.items()


def test_the_network_is_left_as_it_was():
    model, x = Cnn().train(), torch.randn(12, 3, 8, 8)
    torch.manual_seed(1)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure_plasticity(model, x, LABELS, kernel_samples=2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks
               for m in model.modules())  # fmt: skip
    assert all(p.grad is None for p in model.parameters())
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_network_is_measured_without_its_graph(whole):
    model, x = Mlp(), torch.randn(12, 6)
    expected = measure_plasticity(model, x, LABELS)
    if whole:
        found = measure_plasticity(torch.compile(model, backend="eager"), x, LABELS)
    else:
        model.compile(backend="eager")
        found = measure_plasticity(model, x, LABELS)
    for tag in ("units", "dead_units", "dormant/0", "rank/effective_rank", "grad_norm/l2"):
        assert found[tag] == expected[tag]


def test_what_cannot_be_seen_is_said():
    class ByHand(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h * (h > 0))

    with pytest.warns(UserWarning, match="no hidden unit was seen"):
        found = measure_plasticity(ByHand(), torch.randn(12, 6))
    assert "weight_norm/l2" in found and not [t for t in found if t.startswith("dormant")]
    with pytest.raises(UserError, match="kernel_samples -1"):
        measure_plasticity(Mlp(), torch.randn(12, 6), kernel_samples=-1)


def test_the_tangent_kernel_of_a_few_inputs():
    model, x = Mlp(), torch.randn(12, 6)
    rows = []
    for sample in x[:4]:
        model.zero_grad()
        model(sample[None]).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    model.zero_grad()
    values = torch.linalg.svdvals(torch.stack(rows)) ** 2
    p = values / values.sum()
    found = measure_plasticity(model, x, kernel_samples=4)["entk_effective_rank"]
    assert found == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)


def test_the_callback_writes_what_tensorboard_shows(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, x = Mlp(), torch.randn(12, 6)
    with SummaryWriter(str(tmp_path)) as writer:
        callback = PlasticityCallback(writer, x, LABELS, every=3)
        written = [callback(model, step) for step in range(7)]
    assert [bool(values) for values in written] == [True, False, False, True, False, False, True]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"plasticity/{tag}" for tag in written[0]}
    dead = events.Scalars("plasticity/dead_units")
    assert [(e.step, e.value) for e in dead] == [(s, written[0]["dead_units"]) for s in (0, 3, 6)]
    one = PlasticityCallback(writer, x, every=1, tags=["rank/srank9"])
    with pytest.raises(UserError, match="'rank/srank99'"):
        one(model, 0)
    with pytest.raises(UserError, match="every 0"):
        PlasticityCallback(writer, x, every=0)


def test_features_that_are_not_finite_are_told_without_labels() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(8, 3)
    inputs[0, 0] = torch.nan
    with pytest.raises(NumericError):
        measure_plasticity(model, inputs)


def test_a_frozen_network_with_a_parameter_that_nothing_uses() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    found = measure_plasticity(model, torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    assert "rank/effective_rank" in found

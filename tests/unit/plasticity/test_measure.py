"""`measure`: any network, one batch, named numbers, and nothing left behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import dynmoe
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer
from dynmoe.plasticity import measure, measure_all, take_probe

GENERAL = {"rank/srank99", "rank/effective_rank", "weight_norm/l2", "weight_norm/mean_abs"}


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Name -> a classifier of 5 classes and a batch of 12."""
    x, images = torch.randn(12, 6), torch.randn(12, 3, 8, 8)
    mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 5))
    moe = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), MoELayer(16, 5, 20, num_experts=3))
    conv = nn.Conv2d(3, 4, 3, padding=1)
    convnet = nn.Sequential(
        conv, nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return {"mlp": (mlp, x), "moe": (moe, x), "convnet": (convnet, images), "vit": (vit(), images)}


@pytest.fixture(params=["mlp", "moe", "convnet", "vit"])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    return networks()[request.param]


def test_every_network_gets_the_general_figures(network):
    model, inputs = network
    with_labels = measure(model, inputs, torch.arange(12) % 5)
    without = measure(model, inputs)
    assert GENERAL | {"dormant/0.025"} <= without.keys() < with_labels.keys()
    assert {"grad_norm/l2", "grad_norm/zero_share"} <= with_labels.keys()
    assert not [tag for tag in without if tag.startswith("grad_norm")]
    assert without == {tag: with_labels[tag] for tag in without}
    assert all(type(v) is float and math.isfinite(v) for v in with_labels.values())


def test_experts_are_measured_where_there_are_some():
    nets = networks()
    assert "router/entropy" in measure(*nets["moe"]) and "dormant_routed/0" in measure(*nets["moe"])
    assert not [tag for tag in measure(*nets["mlp"]) if tag.startswith("router")]


def test_the_model_is_left_as_it_was(network):
    model, inputs = network
    model.train()
    model(inputs).sum().backward()
    torch.manual_seed(3)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    measure(model, inputs, torch.arange(12) % 5)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training and all(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_figures_are_those_of_a_probe():
    model, inputs = networks()["mlp"]
    labels = torch.arange(12) % 5
    found = measure(model, inputs, labels)
    assert (found.pop("units"), found.pop("dead_units")) == (16, 0)
    assert found == measure_all(take_probe(model, inputs, labels))
    assert dynmoe.measure_plasticity is measure


def test_features_are_what_enters_the_output_layer():
    """Of a net that ends with an MoE layer, and of one that ends with a convolution."""
    rank_one = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 16), MoELayer(16, 5, 20))
    with torch.no_grad():
        rank_one[1].bias.zero_()
    assert measure(rank_one, torch.randn(12, 6))["rank/srank99"] == 1
    ones = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 5, 1))
    assert measure(ones, torch.randn(4, 3, 8, 8))["rank/feature_rank"] == 1


def test_tokens_without_labels():
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5))
    assert measure(model, torch.randn(4, 7, 6)).keys() >= GENERAL


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="classifier="):
        measure(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(4, 6))
    with pytest.raises(ValueError, match="empty"):
        measure(nn.Linear(6, 5), torch.randn(0, 6))
    with pytest.raises(ValueError, match="logits"):
        measure(nn.Linear(6, 5), torch.randn(4, 7, 6), torch.zeros(4, dtype=torch.long))

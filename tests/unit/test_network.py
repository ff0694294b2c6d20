"""Networks: every registered trunk under a head of dense or MoE blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cl_benchmarks.networks import (
    Network,
    Trunk,
    build_network,
    check_bank,
    dense_block,
    image_statistics,
)
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, moe_layers
from dynmoe.plasticity.probes import take_probe

NETWORKS = registry.names("network")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def config(name: str, **options: Any) -> Trunk.Config:
    options = {"width": 12, "hidden": 20} | options
    return registry.get("network", name).Config(**options)


def moe_block(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
    bank = "conv" if images else "pool"
    return MoELayer(dim_in, dim_out, hidden, num_experts=2, max_experts=2, bank=bank)


def one_expert(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
    return MoELayer(dim_in, dim_out, hidden, bank="conv" if images else "pool")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 64)], ids=str)
@pytest.mark.parametrize("make_block", [dense_block, moe_block])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_every_network_gets_a_gradient(name, make_block, shape):
    network = build_network(config(name, blocks=2, place="all"), shape, 7, make_block)
    logits = network(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", NETWORKS)
def test_default_options_build(name):
    network = build_network(registry.get("network", name).Config(), (3, 32, 32), 5)
    assert network.classifier.out_features == 5


@pytest.mark.parametrize(
    ("place", "blocks", "kinds"), [("last", 3, "ddm"), ("all", 3, "mmm"), ("last", 1, "m")]
)
def test_place_says_which_blocks_are_moe_layers(place, blocks, kinds):
    settings = config("mlp", blocks=blocks, place=place)
    network = build_network(settings, (1, 4, 4), 5, moe_block)
    parts = {nn.Sequential: "d", MoELayer: "m", nn.ReLU: "-"}
    assert "".join(parts[type(block)] for block in network.blocks) == "-".join(kinds)
    assert len(list(moe_layers(network))) == kinds.count("m")
    sizes = [layer.bank.w_in.shape for _, layer in moe_layers(network)]
    assert all(size == (20, 12) for size in sizes)


def test_parameter_counts_of_dense_and_one_expert_heads():
    """20 hidden units on width 12, 16 pixels, 5 classes, two blocks, counted by hand."""
    neck, classifier = 16 * 12 + 12, 12 * 5 + 5
    dense = 12 * 20 + 20 + 20 * 12 + 12
    settings = config("mlp", blocks=2, place="all")
    assert count(build_network(settings, (1, 4, 4), 5)) == neck + 2 * dense + classifier
    router = 12
    moe = build_network(settings, (1, 4, 4), 5, one_expert)
    assert count(moe) == neck + 2 * (dense + router) + classifier


def test_trunk_sizes_by_hand():
    settings = config("cnn", channels=5)
    trunk = settings.build((2, 16, 24))
    assert trunk.out_features == 10 * 2 * 3
    assert count(trunk) == (2 * 16 * 5 + 5) + (5 * 9 * 10 + 10)
    assert config("mlp").build((3, 4, 5)).out_features == 60
    assert config("vgg16").build((3, 64, 32)).out_features == 512 * 2
    assert config("resnet18").build((3, 64, 32)).out_features == 512


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 41), st.integers(8, 41), st.integers(1, 4))
def test_cnn_knows_its_own_output_size(height, width, channels):
    trunk = config("cnn", channels=2).build((channels, height, width))
    assert trunk(torch.randn(1, channels, height, width)).shape == (1, trunk.out_features)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cnn", (3, 7, 8)), ("cnn", (3, 8, 7)), ("vgg16", (3, 31, 40)), ("vgg16", (3, 40, 31))],
)
def test_images_too_small_are_refused(name, shape):
    with pytest.raises(UserError, match=f"{name}: images are {shape[1]}x{shape[2]}"):
        config(name).build(shape)


@pytest.mark.parametrize("bad", [{"blocks": 0}, {"hidden": 0}, {"width": -1}])
def test_empty_heads_are_refused(bad):
    with pytest.raises(UserError, match=r"must each be at least 1|width=-1 "):
        build_network(config("mlp", **bad), (1, 4, 4), 5)


def test_the_global_seed_decides_the_weights_and_blocks_leave_the_rest_alone():
    def build(make_block: Any) -> Network:
        torch.manual_seed(3)
        return build_network(config("cnn"), (3, 16, 16), 5, make_block)

    dense, again, moe = build(dense_block), build(dense_block), build(moe_block)
    torch.testing.assert_close(dense.state_dict(), again.state_dict(), rtol=0, atol=0)
    for part in ("trunk", "neck"):
        ours, theirs = getattr(dense, part).state_dict(), getattr(moe, part).state_dict()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# places, neck and scale --------------------------------------------------------------------------

TRUNKS = [("cnn", {}), ("vgg16", {"scale": 0.125}), ("resnet18", {"scale": 0.125})]


@pytest.mark.parametrize("neck", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_head_maps_the_features_to_the_classes(neck, blocks):
    settings = config("cnn", place="head", blocks=blocks, neck=neck)
    width = 12 if neck else settings.build((1, 16, 16)).out_features
    moe = build_network(settings, (1, 16, 16), 5, moe_block)
    assert [name for name, _ in moe_layers(moe)] == ["classifier"]
    assert moe.classifier.bank.w_in.shape == (20, width)
    assert moe.output_layers() == [moe.classifier]
    dense = build_network(settings, (1, 16, 16), 5)
    assert dense.output_layers() == [dense.classifier[2]]
    for network in (moe, dense):
        assert network(torch.randn(3, 1, 16, 16)).shape == (3, 5)
        probe = take_probe(network, torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 4]))
        assert probe.features.shape == (3, width if network is moe else 20)


def test_without_a_neck_the_blocks_read_the_trunks_features():
    network = build_network(config("mlp", neck=False), (1, 4, 4), 5)
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(network(x), network.classifier(network.blocks(x.flatten(1))))
    assert network.blocks[0][0].in_features == network.classifier.in_features == 16


@pytest.mark.parametrize(("place", "expected"), [("trunk", 1), ("everywhere", 3)])
@pytest.mark.parametrize(("name", "options"), TRUNKS)
def test_layers_in_the_trunk_are_of_images_and_learn(name, options, place, expected):
    settings = config(name, place=place, blocks=2, trunk_hidden=6, **options)
    network = build_network(settings, (3, 32, 32), 5, moe_block)
    layers = dict(moe_layers(network))
    assert len(layers) == expected
    trunk = next(layer for name, layer in layers.items() if name.startswith("trunk"))
    assert trunk.bank.name == "conv" and trunk.bank.w_in.shape[0] == 6
    nn.functional.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in trunk.parameters())
    dense = build_network(settings, (3, 32, 32), 5)
    single = build_network(settings, (3, 32, 32), 5, one_expert)
    routers = sum(count(layer.router) for _, layer in moe_layers(single))
    assert count(single) == count(dense) + routers


def test_a_trunk_without_a_place_refuses():
    with pytest.raises(UserError, match="network mlp has no place for an MoE layer in its trunk"):
        build_network(config("mlp", place="trunk"), (1, 4, 4), 5)


@pytest.mark.parametrize(
    ("place", "bank", "complaint"),
    [
        ("trunk", "pool", "--bank pool is for vectors; use --bank conv"),
        ("last", "conv", "--bank conv is for images; use --network.place trunk"),
        ("everywhere", "conv", "its trunk has bank conv anyway"),
    ],
)
def test_banks_that_do_not_fit_their_place_are_refused(place, bank, complaint):
    with pytest.raises(UserError, match=complaint):
        check_bank(config("cnn", place=place), registry.get("bank", bank).Config())
    check_bank(config("cnn", place="trunk"), registry.get("bank", "conv").Config())
    check_bank(config("cnn", place="everywhere"), registry.get("bank", "pool").Config())


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_scale_multiplies_all_channels(name):
    trunk = config(name, scale=0.25).build((1, 32, 32))
    assert trunk.out_features == 128
    channels = {m.out_channels for m in trunk.modules() if isinstance(m, nn.Conv2d)}
    assert channels == {16, 32, 64, 128}
    assert trunk(torch.randn(2, 1, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 0.001])
@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_scales_that_leave_a_layer_empty_are_refused(name, scale):
    with pytest.raises(UserError, match=rf"{name}: scale={scale} (must be|leaves a layer of 64)"):
        config(name, scale=scale).build((3, 32, 32))


def test_image_statistics_are_means_steps_and_deviations() -> None:
    x = torch.randn(3, 2, 8, 6)
    found = image_statistics(x).view(3, 6, 2)
    right, below = x.diff(dim=3), x.diff(dim=2)
    torch.testing.assert_close(found[:, 0], x.mean(dim=(2, 3)))
    torch.testing.assert_close(found[:, 1], right.abs().mean(dim=(2, 3)).log1p())
    for place, values in ((3, x), (4, right), (5, below)):
        torch.testing.assert_close(found[:, place], values.std(dim=(2, 3), correction=0))

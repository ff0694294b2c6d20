"""Upcycled MLPs: the same function as a loop over dense parts, and still trainable and growable."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, moe_layers
from dynmoe.moe.diagnostics import FunctionChange, function_change, output_change
from dynmoe.moe.upcycle import balanced_clusters, upcycle, upcycle_vit


def make_mlp(act: nn.Module | None = None, bias: bool = True, hidden: int = 13) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Linear(5, hidden, bias=bias), nn.Linear(hidden, 4, bias=bias)
    return nn.Sequential(first, act or nn.GELU(), second).double()


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.double)


def router(name: str, **options):
    return registry.get("router", name).Config(**options)


@pytest.mark.parametrize("name", ["cosine", "softmax"])
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("experts", [1, 2, 5, 13])
def test_split_keeps_the_function(name, cluster, experts, device):
    mlp, x = make_mlp().to(device), samples(3, 7).to(device)
    layer = upcycle(mlp, experts, cluster=cluster, router=router(name), max_experts=14)
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-12, atol=1e-12)
    assert layer.num_experts == experts and layer.max_experts == 14
    assert sum(layer.bank.hidden_sizes()) == 13
    assert max(layer.bank.hidden_sizes()) - min(layer.bank.hidden_sizes()) <= 1
    rows = torch.cat([layer.bank.w_in, layer.bank.b_in[:, None], layer.bank.w_out.T], dim=1)
    units = torch.cat([mlp[0].weight, mlp[0].bias[:, None], mlp[2].weight.T], dim=1)
    assert sorted(rows.tolist()) == sorted(units.tolist())  # a partition: every unit once


@pytest.mark.parametrize(("name", "k"), [("cosine", 0), ("softmax", 0), ("topk", 2), ("topk", 3)])
def test_copies_keep_the_function_whatever_the_gates(name, k):
    mlp, x = make_mlp(), samples(9)
    layer = upcycle(mlp, 3, how="copy", router=router(name, **({"k": k} if k else {})))
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-12, atol=1e-12)
    assert layer.bank.hidden_sizes() == [13, 13, 13] and layer.gate_scale == "one"
    assert layer.last_routing.gates.std(dim=0).min() > 1e-3  # gates do depend on the sample
    outputs = layer.bank.expert_outputs(x)
    torch.testing.assert_close(outputs, mlp(x).expand(3, -1, -1), rtol=1e-12, atol=1e-12)


def test_a_split_top_k_layer_computes_with_the_chosen_parts():
    mlp, x = make_mlp(nn.Tanh(), hidden=12), samples(6)
    layer = upcycle(mlp, 4, router=router("topk", k=3))
    y = layer(x)
    for sample in range(6):
        expected = torch.zeros(4, dtype=torch.double)
        for expert in layer.last_routing.chosen[sample].nonzero().flatten().tolist():
            part = slice(3 * expert, 3 * expert + 3)
            hidden = torch.tanh(mlp[0].weight[part] @ x[sample] + mlp[0].bias[part])
            expected += mlp[2].weight[:, part] @ hidden + mlp[2].bias / 4
        torch.testing.assert_close(y[sample], expected, rtol=1e-12, atol=1e-12)
    everything = upcycle(mlp, 4, router=router("topk", k=4))
    torch.testing.assert_close(everything(x), mlp(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh()], ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_activations_and_missing_biases(act, bias):
    mlp, x = make_mlp(act, bias), samples(8)
    for how in ("split", "copy"):
        layer = upcycle(mlp, 3, how=how)
        torch.testing.assert_close(layer(x), mlp(x), rtol=1e-12, atol=1e-12)
        assert bool(layer.bank.b_in.any()) is bool(layer.bank.b_out.any()) is bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_mode_and_generator(dtype):
    mlp = make_mlp().to(dtype).eval()
    layer = upcycle(mlp, 3, how="copy", generator=torch.Generator().manual_seed(5))
    assert {p.dtype for p in layer.parameters()} == {dtype} and not layer.training
    assert upcycle(mlp.train(), 3).training
    again = upcycle(mlp, 3, how="copy", generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.router.weight, layer.router.weight)
    assert not torch.equal(upcycle(mlp, 3, how="copy").router.weight, layer.router.weight)


@pytest.mark.parametrize("name", ["cosine", "softmax", "topk"])
@pytest.mark.parametrize("how", ["split", "copy"])
def test_upcycled_layers_learn_and_grow(name, how):
    """Equal router rows part, and the gradient of each is of ordinary size from the start."""
    mlp, x = make_mlp(nn.ReLU(), hidden=12), samples(32)
    target = torch.randn(32, 4, dtype=torch.double)
    layer = upcycle(mlp, 2, how=how, router=router(name), max_experts=4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    controller = GrowthController(layer, optimizer)
    losses = []
    for step in range(8):
        if step == 4:
            controller.grow(step, (x, None))
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        assert layer.router.weight.grad.norm() < 100
        if step == 0 and how == "split":
            assert layer.router.weight.grad[:2].norm(dim=1).min() > 1e-6
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[0] and losses[7] < losses[4]
    assert layer.num_experts == 3 and sum(layer.bank.hidden_sizes()) == len(layer.bank.segment)
    assert not torch.equal(layer.router.weight[0], layer.router.weight[1])


def test_timms_mlp_and_idle_parts():
    x = samples(2, 6)
    mlp = Mlp(5, 8, 3).double()
    torch.testing.assert_close(upcycle(mlp, 2)(x), mlp(x), rtol=1e-12, atol=1e-12)
    padded = nn.Sequential(*make_mlp()[:2], nn.Dropout(0.0), nn.Identity(), make_mlp()[2])
    torch.testing.assert_close(upcycle(padded, 2)(x), padded(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (nn.Linear(3, 3), "Linear of nothing is no two-layer MLP"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "no two-layer MLP"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 3)), "no two-layer MLP"),
        (nn.ModuleList([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)]), "no two-layer MLP"),
        (GluMlp(4, 8), "GluMlp of .* is no two-layer MLP"),
        (Mlp(4, 8, norm_layer=nn.LayerNorm), "no two-layer MLP"),
        (Mlp(4, 8, drop=0.1), "dropout 0.1, MoE layers have none"),
        (Mlp(4, 8, act_layer=nn.ELU), r"activation ELU\(alpha=1.0\) is not known"),
        (make_mlp(nn.GELU(approximate="tanh")), "approximate='tanh'.* allowed are ReLU, GELU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_modules_are_refused(mlp, message):
    with pytest.raises(UserError, match=message) as error:
        upcycle(mlp, 2)
    assert "\n" not in str(error.value)


def test_bad_options():
    with pytest.raises(UserError, match="14 experts cannot share 13 hidden units"):
        upcycle(make_mlp(), 14)
    with pytest.raises(UserError, match="how='slice' must be 'split' or 'copy'"):
        upcycle(make_mlp(), 2, how="slice")
    with pytest.raises(UserError, match="cluster=True needs how='split'"):
        upcycle(make_mlp(), 2, how="copy", cluster=True)


# ---------------------------------------------------------------- clusters


def test_clusters_find_planted_groups():
    centres = 10 * torch.eye(4, 6)
    planted = torch.arange(20) % 4
    rows = centres[planted] + 0.1 * torch.randn(20, 6)
    found = [
        balanced_clusters(rows, [5] * 4, torch.Generator().manual_seed(seed)) for seed in range(9)
    ]
    groups = [{frozenset((owner == e).nonzero().flatten().tolist()) for e in range(4)}
              for owner in found]  # fmt: skip
    right = {frozenset((planted == e).nonzero().flatten().tolist()) for e in range(4)}
    assert groups.count(right) >= 6  # k-means may end in a local minimum


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_clusters_have_the_sizes_asked_for(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    owner = balanced_clusters(torch.randn(sum(sizes), 3, generator=generator), sizes, generator)
    assert torch.bincount(owner, minlength=len(sizes)).tolist() == sizes


def test_clusters_are_tighter_than_chance():
    ratios = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(24, 3, generator=generator, dtype=torch.double)
        owner = balanced_clusters(rows, [8] * 3, generator)

        def spread(owner: Tensor) -> float:
            groups = [rows[owner == e] for e in range(3)]  # noqa: B023 - called at once
            return sum(float((g - g.mean(dim=0)).square().sum()) for g in groups)

        chance = [spread(owner[torch.randperm(24, generator=generator)]) for _ in range(30)]
        ratios.append(spread(owner) / (sum(chance) / 30))
    assert max(ratios) < 0.9 and sum(ratios) / 20 < 0.65


# ---------------------------------------------------------------- vision transformers


def make_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (None, ["blocks.0.mlp", "blocks.1.mlp"]),
        ([-1], ["blocks.1.mlp"]),
        ([1, 0, -2], ["blocks.0.mlp", "blocks.1.mlp"]),
        ([], []),
    ],
)
def test_a_vision_transformer_keeps_its_function(blocks, names):
    model, images = make_vit().double(), torch.randn(3, 3, 16, 16, dtype=torch.double)
    dense = copy.deepcopy(model)
    assert upcycle_vit(model, 4, blocks, max_experts=6) == names
    assert [name for name, _ in moe_layers(model)] == names
    change = function_change(dense, model, images)
    assert change.largest < 1e-12 and change.relative < 1e-12 and change.cosine == pytest.approx(1)
    controller = GrowthController(
        model, granularity=2, init=registry.get("init", "duplicate").Config()
    )
    assert controller.grow(0, (images, None)).shock["output_change"] < 1e-10 if names else True
    model.train()(images).sum().backward()
    assert all(layer.router.weight.grad is not None for _, layer in moe_layers(model))


def test_blocks_of_a_transformer_get_routers_of_their_own():
    model = make_vit()
    upcycle_vit(model, 3, how="copy", router=router("topk", k=2))
    first, second = (layer for _, layer in moe_layers(model))
    assert isinstance(first, MoELayer) and first.router.k == 2
    assert not torch.equal(first.router.weight, second.router.weight)


def test_a_model_that_cannot_be_converted_stays_as_it_was():
    model = make_vit()
    model.blocks[1].mlp.act = nn.ELU()
    with pytest.raises(UserError, match="activation ELU"):
        upcycle_vit(model, 2)
    assert isinstance(model.blocks[0].mlp, Mlp)
    with pytest.raises(UserError, match="block 2 must be between -2 and 1"):
        upcycle_vit(model, 2, [0, 2])
    with pytest.raises(UserError, match="Sequential has no blocks with an mlp"):
        upcycle_vit(make_mlp(), 2)


# ---------------------------------------------------------------- the report


def test_change_of_outputs():
    before, after = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    change = output_change(before, after)
    assert change.largest == 3 and change.relative == pytest.approx(3 / 5)
    assert change.cosine == pytest.approx((9 + 4) / (5 * 10**0.5))
    assert output_change(before, before) == FunctionChange(0.0, 0.0, 1.0)
    assert output_change(0 * before, 0 * before) == FunctionChange(0.0, 0.0, 1.0)
    assert output_change(0 * before, before).relative == float("inf")
    assert output_change(before, -2 * before) == FunctionChange(12.0, pytest.approx(3), -1.0)


def test_a_report_leaves_the_modules_as_they_were():
    mlp, layer = make_mlp().train(), MoELayer(5, 4, 8, num_experts=2).double().train()
    layer(samples(3))
    routing = layer.last_routing
    change = function_change(mlp, layer, samples(11))
    assert change.relative > 0.1 and mlp.training and layer.training
    assert layer.last_routing is routing

"""LoRA experts, and putting them beside the linear layers of a trained network."""

from __future__ import annotations

import copy

import pytest
import torch
from bank_cases import make_layer, samples
from torch import nn

from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import MoELayer, moe_layers
from dynmoe.moe.experts.low_rank import LoRAPool
from dynmoe.moe.upcycle import Adapted, adapt_linears


def make_lora(dim_in: int, dim_out: int) -> MoELayer:
    return MoELayer(
        dim_in, dim_out, 4, num_experts=2, max_experts=3, bank=LoRAPool.Config(alpha=8.0)
    )


def make_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


def test_mixing_outputs_is_mixing_products():
    """sum_e g_e B_e A_e is one update matrix per sample."""
    layer, x = make_layer("lora", gate_scale="one"), samples("lora")
    gates, bank, y = layer.router(x).gates, layer.bank, layer(x)
    for n in range(len(x)):
        update = torch.zeros(4, 5, dtype=torch.double)
        for unit, owner in enumerate(bank.segment.tolist()):
            update += gates[n, owner] * torch.outer(bank.w_out[:, unit], bank.w_in[unit])
        torch.testing.assert_close(y[n], 16 / 12 * update @ x[n], rtol=1e-12, atol=1e-12)


def test_ranks_that_growth_adds_leave_the_scale():
    layer = make_layer("lora", bank={"alpha": 3.0})
    assert layer.bank.scale == 3.0 / 12
    GrowthController(layer, budget=Budget(mode="per-growth", units=6)).grow(
        1, (samples("lora"), None)
    )
    assert layer.bank.scale == 3.0 / 12 and len(layer.bank.segment) == 18


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(UserError, match=f"alpha={alpha} must be a number above 0"):
        make_layer("lora", bank={"alpha": alpha})


def test_an_adapted_layer_starts_as_it_was_and_learns_beside_it():
    base = nn.Linear(6, 3).double()
    twin, x = copy.deepcopy(base), torch.randn(2, 5, 6, dtype=torch.double)
    adapted = Adapted(base, make_lora(6, 3))
    assert torch.equal(adapted(x), twin(x))
    assert adapted.layer.bank.w_in.dtype == torch.double
    optimizer = torch.optim.SGD(adapted.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
    assert base.weight.grad is None and torch.equal(base.weight, twin.weight)
    assert adapted.layer.bank.w_in.grad.any() and adapted.layer.bank.w_out.any()
    torch.testing.assert_close(adapted(x) - twin(x), adapted.layer(x))


def test_a_vision_transformer_keeps_its_function_grows_and_learns():
    vit = make_vit()
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    expected = vit(x).detach()
    before = copy.deepcopy(vit.state_dict())
    adapted = adapt_linears(vit, r"attn\.qkv$", make_lora)
    assert list(adapted) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert len(list(moe_layers(vit))) == 2
    assert vit.blocks[0].attn.qkv is adapted["blocks.0.attn.qkv"]
    torch.testing.assert_close(vit(x), expected)
    vit.requires_grad_(False)
    for module in adapted.values():
        module.layer.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in vit.parameters() if p.requires_grad], 1e-2)
    controller = GrowthController(vit, optimizer, budget=Budget(mode="per-growth"))
    losses = []
    for step in range(12):
        loss = nn.functional.cross_entropy(vit(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 5:
            controller.grow(step, (x, labels))
    assert losses[-1] < losses[0] - 0.2
    after = vit.state_dict()
    assert all(torch.equal(after[k.replace("qkv", "qkv.base")], v) for k, v in before.items())


def test_layers_are_found_by_pattern_or_name_and_only_once():
    def fresh() -> nn.Module:
        return nn.ModuleDict(
            {"a": nn.Linear(2, 3), "deep": nn.Sequential(nn.Linear(3, 3), nn.ReLU())}
        )

    model = fresh()
    assert list(adapt_linears(model, ".", make_lora)) == ["a", "deep.0"]
    with pytest.raises(UserError, match=r"'\.' matches no linear layer of the model; it has none"):
        adapt_linears(model, ".", make_lora)
    model = fresh()
    assert list(adapt_linears(model, ["deep.0"], make_lora)) == ["deep.0"]
    assert isinstance(model["deep"][0], Adapted) and isinstance(model["a"], nn.Linear)
    with pytest.raises(UserError, match=r"'b' is not a linear layer .*; there are: a, deep\.0$"):
        adapt_linears(fresh(), ["a", "b"], make_lora)
    with pytest.raises(UserError, match=r"'x\$' matches no linear layer"):
        adapt_linears(fresh(), "x$", make_lora)
    with pytest.raises(UserError, match="it has none"):
        adapt_linears(nn.Linear(2, 2), ".", make_lora)


def test_a_shared_linear_layer_gets_one_adapter():
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    assert list(adapt_linears(model, ".", make_lora)) == ["0"]
    assert model[0] is model[2] and isinstance(model[0], Adapted)


def test_the_output_map_of_torchs_attention_is_passed_over():
    """It is read, never called: an adapter there would break it."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(adapt_linears(model, ".", make_lora)) == ["linear1", "linear2"]
    model.train()
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)

"""Experts trained apart: each says what its MLP says, the rest is a mean, later ones find room."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.initialisation import RandomInit
from dynmoe.moe import MoELayer, moe_layers
from dynmoe.moe.import_experts import experts_from_mlps, mix_models, set_expert
from dynmoe.moe.routers.nexus import NexusRouter

DOMAINS = torch.eye(3, dtype=torch.double)


def mlp(hidden: int = 7, bias: bool = True, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    first, second = nn.Linear(5, hidden, bias=bias), nn.Linear(hidden, 4, bias=bias)
    return nn.Sequential(first, act(), second).double()


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.double)


def small_vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3
    ).double()


@pytest.mark.parametrize("router", ["softmax", "topk"])
def test_experts_are_the_mlps(router):
    """Of other numbers of hidden units, and without biases; a shared one is added with gate 1."""
    mlps, shared, x = [mlp(7), mlp(3, bias=False), mlp(5)], mlp(2), samples(2, 6)
    layer = experts_from_mlps(mlps, shared=shared, router=router, max_experts=4)
    y, gates = layer(x), layer.last_routing.gates.view(2, 6, 4)
    expected = shared(x) + sum(gates[..., e : e + 1] * m(x) for e, m in enumerate(mlps))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert layer.bank.hidden_sizes() == [7, 3, 5] and layer.max_experts == 4
    one = experts_from_mlps([mlps[0]] * 3, router="softmax")
    torch.testing.assert_close(one(x), mlps[0](x))


def test_models_are_mixed():
    """MLPs become experts, all else is the mean; the models stay as they were."""
    seed, models = small_vit(), []
    for _ in range(3):
        model = copy.deepcopy(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        models.append(model)
    before = copy.deepcopy(models[0].state_dict())
    mixed = mix_models(models, r"^blocks\.\d+\.mlp$", router="softmax")
    assert [name for name, _ in moe_layers(mixed)] == ["blocks.0.mlp", "blocks.1.mlp"]
    torch.testing.assert_close(models[0].state_dict(), before, rtol=0, atol=0)
    for key, value in mixed.state_dict().items():
        if ".mlp." not in key:
            mean = sum(model.state_dict()[key] for model in models) / 3
            torch.testing.assert_close(value, mean)
    x = torch.randn(4, 5, 8, dtype=torch.double)
    outputs = mixed.blocks[1].mlp.bank.expert_outputs(x.flatten(0, 1))
    for own, model in zip(outputs, models, strict=True):
        torch.testing.assert_close(own, model.blocks[1].mlp(x).flatten(0, 1))
    images = torch.randn(2, 3, 8, 8, dtype=torch.double)
    alike = mix_models([seed, seed], r"\.mlp$", router="softmax")
    torch.testing.assert_close(alike(images), seed(images))
    mixed(images).sum().backward()
    assert mixed.blocks[0].mlp.router.weight.grad.any()


def test_an_mlp_in_two_places_becomes_one_layer():
    models = []
    for _ in range(2):
        one = mlp()
        models.append(nn.ModuleDict({"a": nn.Sequential(one), "b": nn.Sequential(one)}))
    mixed = mix_models(models, r"^a\.0$")
    assert isinstance(mixed["a"][0], MoELayer) and mixed["b"][0] is mixed["a"][0]


def test_batch_norms_keep_a_whole_count():
    models = [nn.Sequential(mlp(), nn.BatchNorm1d(4).double()) for _ in range(2)]
    models[0](samples(9))
    mixed = mix_models(models, r"^0$", router="softmax")
    assert int(mixed[1].num_batches_tracked) == 1
    torch.testing.assert_close(
        mixed[1].running_mean, (models[0][1].running_mean + models[1][1].running_mean) / 2
    )


def test_nexus_rows_are_projected_embeddings():
    config = NexusRouter.Config(dim=3, k=2)
    router = config.build(5, 3, 4, torch.Generator().manual_seed(0)).double()
    router.set_domain(1, DOMAINS[1])
    x = samples(6)
    routing = router(x)
    rows = []
    for d in router.weight[:3]:
        g = router.gate.weight @ d
        rows.append(router.out.weight @ (g / (1 + torch.exp(-g)) * (router.value.weight @ d)))
    scores = x @ torch.stack(rows).T
    torch.testing.assert_close(routing.logits[:, :3], scores)
    best = scores.softmax(dim=1).topk(2, dim=1)
    torch.testing.assert_close(
        routing.gates.gather(1, best.indices), best.values / best.values.sum(dim=1, keepdim=True)
    )


def test_an_expert_that_comes_later_needs_no_new_router():
    """Old experts and their logits stay; the new row is what P makes of the new domain."""
    router = NexusRouter.Config(dim=3)
    layer = experts_from_mlps([mlp(), mlp()], router=router, max_experts=3)
    for expert in (0, 1):
        layer.router.set_domain(expert, DOMAINS[expert])
    x, later = samples(6), mlp()
    layer(x)
    before = layer.last_routing.logits.detach()
    outputs = layer.bank.expert_outputs(x)[:2].detach()
    optimizer = torch.optim.Adam(layer.parameters())
    controller = GrowthController(
        layer, optimizer, budget=Budget(mode="per-growth", units=7),
        init=RandomInit.Config(router="new"),
    )  # fmt: skip
    controller.grow(1, (x, None))
    set_expert(layer, 2, later, DOMAINS[2])
    y, routing = layer(x), layer.last_routing
    torch.testing.assert_close(routing.logits[:, :2], before[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(layer.bank.expert_outputs(x)[:2], outputs)
    torch.testing.assert_close(layer.bank.expert_outputs(x)[2], later(x))
    torch.testing.assert_close(routing.logits[:, 2], x @ layer.router.rows()[2])
    torch.testing.assert_close(
        y, torch.einsum("ne,eno->no", routing.gates, layer.bank.expert_outputs(x))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: experts_from_mlps([]), "no MLP is given"),
        (lambda: experts_from_mlps([mlp(), mlp(act=nn.ReLU)]), "MLP number 1 is 5 -> 4 with relu"),
        (lambda: experts_from_mlps([mlp()], shared=nn.Linear(5, 4)), "no two-layer MLP"),
        (lambda: mix_models([], "mlp"), "no model is given"),
        (lambda: mix_models([small_vit()], "nothing"), "'nothing' matches no module"),
        (
            lambda: mix_models([nn.Sequential(mlp()), nn.Sequential(mlp(8))], "0"),
            "0.0.weight is .8, 5. in model 1 and .7, 5. in the first",
        ),
        (lambda: set_expert(experts_from_mlps([mlp()]), 1, mlp()), "expert=1 must be one of the 1"),
        (lambda: set_expert(experts_from_mlps([mlp()]), 0, mlp(8)), "5 -> 8 -> 4 with gelu"),
        (
            lambda: set_expert(experts_from_mlps([mlp()]), 0, mlp(), DOMAINS[0]),
            "'cosine' knows no domains",
        ),
        (
            lambda: set_expert(MoELayer(5, 4, 8, bank="swiglu"), 0, mlp()),
            "bank 'swiglu' holds no MLPs",
        ),
        (
            lambda: registry.get("router", "nexus").Config().build(5, 2, 2, None)
            .set_domain(0, DOMAINS[0]),
            "must be 16 finite numbers",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed(call, message):
    with pytest.raises(UserError, match=message):
        call()

"""Initial weights: who decides them, and how a layer is brought back to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bank_cases import BANKS, WIDTHS, WITH_UNITS
from loss_tools import given_by
from router_cases import CASES, VARIANTS
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import MoELayer, MultiHead, moe_layers, share_router
from dynmoe.moe.downcycle import distil
from dynmoe.moe.draws import Noise
from dynmoe.moe.prune import without_experts
from dynmoe.moe.upcycle import Adapted, adapt_linears, upcycle, upcycle_vit

LOSSES = registry.names("loss")
BANK_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "pool as free-standing experts": ("pool", {"output_init": "expert", "spread": 3.0}),
    "swiglu with biases": ("swiglu", {"bias": True}),
    "affine, random": ("affine", {"init_scale": 0.5}),
}
ROUTER_CASES = [*CASES, "prototypes of contexts"]
BANK_CASES = [*BANKS, *BANK_OPTIONS]

PRUNING = registry.get("pruning", "random").Config()

Make = Callable[[], nn.Module]


def router_config(case: str) -> Any:
    name, options = VARIANTS.get(case, (case, {}))
    if case == "prototypes of contexts":
        name, options = "prototypes", {"use": "context", "context_dim": 3}
    return registry.get("router", name).Config(**options)


def with_router(case: str, **options: Any) -> MoELayer:
    return MoELayer(
        5, 4, 12, num_experts=3, max_experts=6, router=router_config(case), shared_hidden=3,
        **options,
    )  # fmt: skip


def with_bank(case: str, **options: Any) -> MoELayer:
    name, own = BANK_OPTIONS.get(case, (case, {}))
    bank = registry.get("bank", name).Config(**own)
    return MoELayer(
        *WIDTHS[name], 12, num_experts=3, max_experts=6, bank=bank, shared_hidden=3, **options
    )


def with_loss(name: str, **options: Any) -> MoELayer:
    losses = [registry.get("loss", name).Config()]
    router = router_config("noisy-topk")
    return MoELayer(5, 4, 12, num_experts=3, max_experts=6, router=router, losses=losses, **options)


def multi_head() -> MultiHead:
    return MultiHead(6, 9, 3, lambda i, o: MoELayer(i, o, 12, num_experts=2, max_experts=4))


def adapted() -> Adapted:
    with torch.random.fork_rng(devices=[]):
        base = nn.Linear(5, 4)
    return Adapted(base, with_bank("lora"))


MAKERS: dict[str, Make] = {
    **{f"router {case}": lambda case=case: with_router(case) for case in ROUTER_CASES},
    **{f"bank {case}": lambda case=case: with_bank(case) for case in BANK_CASES},
    **{f"loss {name}": lambda name=name: with_loss(name) for name in LOSSES},
    "multi-head": multi_head,
}
every_module = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def values(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer, also those that no state_dict has."""
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def seeded(make: Make, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def same(module: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(values(module), values(other), rtol=0, atol=0)


@torch.no_grad()
def spoil(module: nn.Module) -> None:
    """Give everything a value that it never starts with, as memory that was not filled may have."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.fill_(True if tensor.dtype == torch.bool else 77)


@every_module
def test_the_global_seed_decides_and_layers_differ(make):
    first, second = seeded(make), make()
    same(seeded(make), first)
    other = seeded(make, 2)
    for name, weight in first.named_parameters():
        if weight.dim() < 2 or not weight.any():  # some start at 0 or 1
            continue
        for twin in (second, other):
            assert not torch.equal(weight, twin.get_parameter(name)), name


@pytest.mark.parametrize("case", ROUTER_CASES)
def test_a_generator_alone_decides(case):
    def make() -> MoELayer:
        return with_router(case, generator=torch.Generator().manual_seed(3))

    state = torch.get_rng_state()
    first = make()
    assert torch.equal(torch.get_rng_state(), state)
    same(seeded(make, 5), first)
    spoil(first)
    first.reset_parameters(torch.Generator().manual_seed(3))
    same(first, make())


@every_module
def test_a_module_made_on_the_meta_device_is_filled_by_a_reset(make):
    state = torch.get_rng_state()
    with torch.device("meta"):
        module = make()
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert "MoELayer" in repr(module)
    module.reset_parameters()  # nothing to fill yet
    assert torch.equal(torch.get_rng_state(), state)
    module.to_empty(device="cpu")
    spoil(module)
    torch.manual_seed(1)
    module.reset_parameters()
    direct = seeded(make)
    same(module, direct)
    learns = {name: p.requires_grad for name, p in direct.named_parameters()}
    assert {name: p.requires_grad for name, p in module.named_parameters()} == learns


def test_a_generator_is_left_alone_on_the_meta_device():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    with torch.device("meta"):
        for case in ROUTER_CASES:
            with_router(case, generator=generator)
        for case in BANK_CASES:
            with_bank(case, generator=generator)
    assert torch.equal(generator.get_state(), state)


@every_module
def test_a_reset_keeps_precision_and_draws_the_same_numbers(make):
    double = seeded(make).double()
    spoil(double)
    torch.manual_seed(1)
    double.reset_parameters()
    torch.testing.assert_close(values(double), values(seeded(make).double()), rtol=1e-6, atol=0)


def inputs(layer: MoELayer) -> Tensor:
    """Nine samples for a layer's bank."""
    shapes = {"conv": (9, 5, 3, 3), "affine": (9, 2, 5)}
    return torch.randn(shapes.get(layer.bank.name, (9, 5)))


def train_and_grow(layer: MoELayer, case: str) -> None:
    """Three steps, a growth at constant budget, three steps more."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    controller = GrowthController(layer, optimizer, granularity=2, pruning=PRUNING)
    context = torch.randn(9, 3) if case == "prototypes of contexts" else torch.arange(9)
    for step in range(6):
        if step == 3:
            controller.grow(step)
        y = layer(inputs(layer), context=context)
        loss = y.square().sum() + sum(layer.last_losses.values())
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("case", ROUTER_CASES)
def test_a_router_that_learnt_and_grew_is_reset(case):
    layer = seeded(lambda: with_router(case))
    torch.manual_seed(9)
    train_and_grow(layer, case)
    assert layer.num_experts == 5 and layer.last_routing is not None
    check_reset(layer, lambda: with_router(case))


@pytest.mark.parametrize("case", BANK_CASES)
def test_a_bank_that_learnt_and_grew_is_reset(case):
    layer = seeded(lambda: with_bank(case))
    train_and_grow(layer, case)
    assert layer.num_experts == 5
    check_reset(layer, lambda: with_bank(case))


def check_reset(layer: MoELayer, make: Make) -> None:
    """A reset under seed 1 gives what `make` does, in the Parameters that there were."""
    before = dict(layer.named_parameters())
    torch.manual_seed(1)
    layer.reset_parameters()
    assert layer.num_experts == 3 and layer.last_routing is None and not layer.last_losses
    assert all(p is before[name] for name, p in layer.named_parameters())
    same(layer, seeded(make))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_forgets_what_it_saw(name):
    layer = with_loss(name)
    for loss in layer.losses:
        fresh = values(loss)
        loss(given_by(layer, torch.randn(9, 5)))
        loss.reset_parameters()
        torch.testing.assert_close(values(loss), fresh, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_UNITS)
def test_a_pool_that_gained_units_is_not_reset(name):
    layer = with_bank(name)
    GrowthController(layer, pruning=PRUNING, budget=Budget(mode="per-growth", units=4)).grow(1)
    before = values(layer)
    with pytest.raises(UserError, match="grown from 12 to 16 hidden units"):
        layer.reset_parameters()
    torch.testing.assert_close(values(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", BANKS)
def test_a_pruned_layer_goes_back_to_the_experts_that_it_kept(name):
    smaller = without_experts(with_bank(name), [2, 0])
    GrowthController(smaller, pruning=PRUNING).grow(1)
    sizes = smaller.bank.hidden_sizes() if name in WITH_UNITS else None
    smaller.reset_parameters()
    assert smaller.num_experts == 2 and not smaller.created.any()
    if sizes is not None:
        assert len(sizes) == 3 and smaller.bank.hidden_sizes() == [4, 4]


def test_a_shared_router_is_reset_for_all_its_layers():
    net = nn.Sequential(*(MoELayer(5, 5, 12, num_experts=2, max_experts=6) for _ in range(2)))
    share_router(net)
    GrowthController(net, pruning=PRUNING).grow(1)
    for layer in net:
        layer.reset_parameters()
    assert net[0].router is net[1].router
    assert [layer.num_experts for layer in net] == [2, 2]
    assert [layer.bank.hidden_sizes() for layer in net] == [[6, 6], [6, 6]]


def test_what_a_multi_head_or_adapted_layer_is_reset_to():
    for make in (multi_head, adapted):
        module, fresh = seeded(make), seeded(make)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        torch.manual_seed(1)
        module.reset_parameters()
        if make is adapted:  # the base stays what it is
            fresh.base = module.base
        same(module, fresh)


def test_noise_starts_again_with_another_seed():
    noise = Noise(torch.Generator().manual_seed(0))
    first = noise.uniform(torch.empty(4))
    noise.reset_parameters(torch.Generator().manual_seed(1))
    assert not torch.equal(noise.uniform(torch.empty(4)), first)
    noise.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(noise.uniform(torch.empty(4)), first)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.parametrize("options", [{"cluster": True}, {"how": "copy"}], ids=["split", "copy"])
def test_upcycling_follows_the_global_seed(options):
    def make() -> nn.Module:
        return upcycle(mlp(), 3, **options)

    first, second, other = seeded(make), make(), seeded(make, 2)
    same(seeded(make), first)
    for twin in (second, other):
        assert not torch.equal(first.router.weight, twin.router.weight)


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
        )


def upcycled_vit() -> nn.Module:
    model = vit()
    upcycle_vit(model, 3, how="copy")
    return model


def vit_with_lora() -> nn.Module:
    model, bank = vit(), registry.get("bank", "lora").Config()
    adapt_linears(model, "attn.qkv$", lambda i, o: MoELayer(i, o, 4, num_experts=2, bank=bank))
    return model


@pytest.mark.parametrize("make", [upcycled_vit, vit_with_lora])
def test_the_layers_of_a_transformer_differ_and_follow_the_global_seed(make):
    model, other = seeded(make), seeded(make, 2)
    same(seeded(make), model)
    first, second = (layer for _, layer in moe_layers(model))
    assert not torch.equal(first.router.weight, second.router.weight)
    assert not torch.equal(first.router.weight, next(moe_layers(other))[1].router.weight)
    if make is vit_with_lora:
        assert not torch.equal(first.bank.w_in, second.bank.w_in)


def test_distilling_follows_the_global_seed():
    batches = [torch.randn(6, 5) for _ in range(8)]
    layer = MoELayer(5, 4, 12, num_experts=2)

    def curve() -> list[float]:
        return distil(layer, batches, 6)[1]

    torch.manual_seed(1)
    first, second = curve(), curve()
    assert first != second
    torch.manual_seed(1)
    assert curve() == first

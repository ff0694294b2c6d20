"""Every router, bank and loss in half-precision layers and under autocast."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, collect_aux_losses, finish_step

ROUTERS, BANKS = registry.names("router"), registry.names("bank")
LOSSES = registry.names("loss")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WITH_BANKS = [(router, bank, "none") for router in ROUTERS for bank in BANKS]
WITH_LOSSES = [(router, "pool", loss) for router in ROUTERS for loss in LOSSES]
BANKS_AND_LOSSES = [("topk", bank, loss) for bank in BANKS for loss in LOSSES]
CASES = sorted({*WITH_BANKS, *WITH_LOSSES, *BANKS_AND_LOSSES})


def check(router: str, bank: str, loss: str, dtype: torch.dtype, how: str) -> None:
    """One training pass, forward and backward."""
    torch.manual_seed(0)
    layer = MoELayer(
        8, 8, 12, num_experts=3, max_experts=4,
        router=registry.get("router", router).Config(),
        bank=registry.get("bank", bank).Config(),
        losses=[registry.get("loss", loss).Config()],
    )  # fmt: skip
    images = layer.bank.per_sample and layer.bank.channel_axis == 1
    x = torch.randn(6, 8, 3, 3) if images else torch.randn(6, 4, 8)
    context = torch.arange(6) % 3 if layer.bank.per_sample else torch.arange(24).view(6, 4) % 3
    if how == "module":
        layer, x = layer.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype) if how == "autocast" else nullcontext():
        y = layer(x, context=context)
        losses = collect_aux_losses(layer)
    if how == "module":
        assert y.dtype == layer.last_routing.gates.dtype == dtype
    total = y.float().square().mean() + sum(value.float() for value in losses.values())
    assert y.isfinite().all() and total.isfinite()
    if total.requires_grad:
        total.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("dtype", "how"), [("bfloat16", "module"), ("float16", "module"), ("bfloat16", "autocast")]
)
def test_parts_that_go_together_do_so_in_half_precision(dtype, how):
    passed, failed = 0, {}
    for case in CASES:
        try:
            check(*case, HALF[dtype], how)
            passed += 1
        except UserError:  # parts that do not go together, whatever the precision
            continue
        except (AssertionError, RuntimeError) as error:
            failed[case] = str(error)[:200]
    assert not failed and passed > 0.7 * len(CASES)


@pytest.mark.parametrize("options", [{}, {"k": 2}])
@pytest.mark.parametrize("dtype", HALF)
def test_the_domain_router_computes_densities_in_float32(dtype, options):
    config = registry.get("router", "domain").Config(**options)
    router = config.build(8, 3, 4, torch.Generator().manual_seed(0)).to(HALF[dtype])
    x = torch.randn(20, 8).to(HALF[dtype])
    routing, exact = router(x), router.double()(x.double())
    torch.testing.assert_close(routing.logits.double(), exact.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.gates.double(), exact.gates, rtol=1e-2, atol=1e-2)
    assert routing.gates.dtype == HALF[dtype]


@pytest.mark.parametrize("router", ROUTERS)
def test_autocast_leaves_the_routing_as_it_is(router):
    """Of float32 inputs, bit for bit: in bfloat16 near logits tie, and samples choose otherwise."""
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 12, num_experts=3, max_experts=4, router=router).eval()
    x, context = torch.randn(6, 4, 8), torch.arange(24).view(6, 4) % 3
    routings = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x, context=context)
        routings.append(layer.last_routing)
    assert y.dtype == torch.bfloat16
    assert torch.equal(routings[0].logits, routings[1].logits)
    assert torch.equal(routings[0].gates, routings[1].gates)


def test_counts_of_the_gaussian_router_go_on_in_bfloat16():
    """A count of steps in bfloat16 would stop at 256."""
    router = registry.get("router", "gaussian").Config().build(4, 2, 2, None).bfloat16()
    router.steps.fill_(256)
    router(torch.randn(8, 4, dtype=torch.bfloat16))
    router.finish_step()
    assert router.steps == 257


def test_the_selection_bias_keeps_its_precision():
    """Steps of 1e-3 around 0.5 are below the rounding of bfloat16."""
    layer = MoELayer(4, 4, 8, num_experts=4, router="topk", losses=["loss-free"]).train()
    bias = layer.router.selection_bias
    bias.copy_(torch.tensor([0.5, -0.5, 0.5, -0.5]))
    layer.to(torch.bfloat16)
    assert layer.router.selection_bias.dtype == torch.float32
    for _ in range(30):
        layer(torch.randn(32, 4, dtype=torch.bfloat16))
        finish_step(layer)
    moved = layer.router.selection_bias - torch.tensor([0.5, -0.5, 0.5, -0.5])
    assert moved.abs().max() > 0.02
    assert layer.double().router.selection_bias.dtype == torch.float64

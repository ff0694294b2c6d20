"""Losses that look at experts, on every registered bank: through training and one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import LossInput, MoELayer, collect_aux_losses

BANKS = registry.names("bank")
CASES = [
    (loss, bank)
    for loss in ("orthogonal", "gram-schmidt", "distillation", "parseval", "sphere")
    for bank in BANKS
    if (loss, bank) not in {("parseval", "affine"), ("sphere", "affine")}
]
every_case = pytest.mark.parametrize(("name", "bank"), CASES)


def make_layer(name: str, bank: str, router: str = "topk") -> MoELayer:
    """4 -> 4, two experts of room for four, nothing of it 0."""
    layer = MoELayer(
        4,
        4,
        12,
        num_experts=2,
        max_experts=4,
        router=registry.get("router", router).Config(),
        bank=registry.get("bank", bank).Config(),
        losses=(registry.get("loss", name).Config(weight=0.1),),
    )
    with torch.no_grad():
        for parameter in layer.bank.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def inputs(bank: str, n: int = 10) -> Tensor:
    shapes = {"conv": (n, 4, 3, 3), "affine": (n, 2, 4)}
    return torch.randn(shapes.get(bank, (n, 4)))


def value(layer: MoELayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    layer(x, mask)
    return collect_aux_losses(layer)[f".{layer.losses[0].name}"]


@every_case
@pytest.mark.parametrize("router", ["cosine", "topk"])
@pytest.mark.thin(24)
def test_training_through_a_growth_on_every_bank(name, bank, router):
    layer, x = make_layer(name, bank, router), inputs(bank)
    optimizer = torch.optim.Adam(layer.bank.parameters(), 1e-2)
    pruning = registry.get("pruning", "random").Config()
    controller = GrowthController(layer, optimizer, pruning=pruning)
    for growth in range(2):
        values = []
        for _ in range(15):
            loss = value(layer, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values[-1] < values[0], growth
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
        if not growth:
            controller.grow(0)
    assert layer.num_experts == 3


@every_case
def test_rows_of_unborn_experts_and_padding_do_not_count_on_every_bank(name, bank):
    layer, x = make_layer(name, bank), inputs(bank)
    expected = value(layer, x).detach()
    with torch.no_grad():
        for rows in (*layer.router.expert_rows(), *layer.bank.expert_rows()):
            rows[2:] = 1e5
    mask = torch.arange(14) < 10
    loss = value(layer, torch.cat([x, 9 * torch.ones_like(x[:4])]), mask)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    for rows in layer.bank.expert_rows():
        assert rows.grad is None or not rows.grad[2:].any()


@pytest.mark.thin(3)
@every_case
def test_compiled_equals_eager_on_every_bank(name, bank):
    torch._dynamo.reset()
    layer, x = make_layer(name, bank), inputs(bank)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(collect_aux_losses(layer), collect_aux_losses(twin))


def test_parseval_needs_matrices():
    layer = MoELayer(4, 4, 12, num_experts=2, bank=registry.get("bank", "affine").Config())
    x = inputs("affine")
    layer(x)
    given = LossInput(x, layer.last_routing, layer.router, layer.bank)
    with pytest.raises(UserError, match="parseval loss: bank 'affine' has no weight matrices"):
        registry.get("loss", "parseval").Config().build(2)(given)

"""Mixing, gated and distance routers inside a layer: sequences, padding, growth, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, collect_aux_losses, finish_step
from dynmoe.plasticity.kernel import entk_matrix

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "expert-choice": ("expert-choice", {}),
    "slots": ("slots", {}),
    "two slots": ("slots", {"slots_per_expert": 2}),
    "top1 hierarchy": ("hierarchical", {}),
    "top1 hierarchy by products": ("hierarchical", {"gate": "product"}),
    "soft hierarchy": ("hierarchical", {"coarse": "soft", "num_groups": 3}),
    "laplace": ("laplace", {}),
    "relu": ("relu", {}),
    "prototypes": ("prototypes", {"patience": 2}),
    "domain": ("domain", {}),
    "top-2 domain": ("domain", {"k": 2}),
    "token": ("token", {"dim": 4}),
}
every_case = pytest.mark.parametrize("case", CASES)


def make_layer(case: str, experts: int = 2) -> MoELayer:
    name, options = CASES[case]
    config = registry.get("router", name).Config(**options)
    return MoELayer(
        6, 4, 24, num_experts=experts, max_experts=6, router=config, activation="tanh"
    ).double()


def objective(layer: MoELayer, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    error = (layer(x, mask) - target)[mask].square().mean()
    return error + sum(collect_aux_losses(layer).values())


@every_case
def test_growth_in_the_middle_of_training(case, device):
    layer = make_layer(case).to(device)
    x = torch.randn(4, 5, 6, dtype=torch.double, device=device)
    target = torch.randn(4, 5, 4, dtype=torch.double, device=device)
    mask = torch.arange(5, device=device).expand(4, 5) < torch.tensor(
        [[5], [3], [1], [4]], device=device
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    controller = GrowthController(layer, optimizer, granularity=2)
    parameters = list(layer.parameters())
    for experts in (2, 4, 6):
        before = [p.detach().clone() for p in parameters]
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = objective(layer, x, target, mask)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(torch.tensor(losses).isfinite()) and losses[2] != losses[0]
        if case not in ("token", "prototypes"):  # whose noise and jumps may outweigh three steps
            assert losses[2] < losses[0]
        routing = layer.last_routing
        assert layer.num_experts == experts
        assert not routing.gates[:, experts:].any() and not routing.gates[~mask.flatten()].any()
        assert routing.gates.isfinite().all()
        for parameter, old in zip(parameters, before, strict=True):
            assert parameter.isfinite().all()
            alone = experts == 2 and "hierarchy" in case  # each the only one of its group
            fine = alone and parameter is layer.router.weight
            if case == "top1 hierarchy":  # the task does not teach the coarse gate
                fine |= parameter is layer.router.coarse.weight
            assert torch.equal(parameter, old) == fine
        for rows in layer.router.expert_rows():
            assert rows.grad is None or not rows.grad[experts:].any()
        if experts < 6:
            controller.grow(experts, (x, None))
    assert list(layer.parameters()) == parameters


@every_case
def test_padding_and_other_sequences_do_not_matter(case):
    layer = make_layer(case, 4).eval()
    x = torch.randn(3, 5, 6, dtype=torch.double)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False], [False] * 5])
    y = layer(x, mask)
    assert not y[~mask].any() and y.isfinite().all()
    other = torch.where(mask.unsqueeze(2), x, 100 * torch.randn_like(x))
    torch.testing.assert_close(layer(other, mask), y)
    torch.testing.assert_close(layer(x[1:2], mask[1:2]), y[1:2])
    torch.testing.assert_close(layer(x[1:2, mask[1]]), y[1:2, mask[1]])


@every_case
@pytest.mark.thin(4)
def test_one_graph_through_growth(case, device):
    torch._dynamo.reset()
    layer = make_layer(case).float().to(device)
    pruning = registry.get("pruning", "random").Config()
    controller = GrowthController(layer, granularity=2, pruning=pruning)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(3, 4, 6, device=device)
    mask = torch.arange(4, device=device).expand(3, 4) < 3
    for growth in range(3):
        if growth:
            controller.grow(growth)
        eager = copy.deepcopy(layer)
        with torch._dynamo.config.patch(error_on_recompile=growth > 0):
            y = compiled(x, mask)
        torch.testing.assert_close(y, eager(x, mask), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.last_losses, eager.last_losses)
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())
        (y.square().sum() + sum(collect_aux_losses(layer).values())).backward()
    assert layer.num_experts == 6
    assert counter.frame_count == 1


@every_case
def test_a_saved_layer_goes_on_as_before(case):
    layer, other = make_layer(case, 4), make_layer(case, 2)
    x, mask = torch.randn(3, 5, 6, dtype=torch.double), torch.rand(3, 5) < 0.8
    layer(x, mask)
    finish_step(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for _ in range(2):
        assert torch.equal(other(x, mask), layer(x, mask))
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["slots", "token"])
def test_the_tangent_kernel_takes_scalar_parameters(case):
    """Learned scales are scalars; each sample's gradients are laid out in one row."""
    layer, x = make_layer(case).eval(), torch.randn(3, 6, dtype=torch.double)
    assert any(p.dim() == 0 for p in layer.parameters())
    rows = []
    for sample in x:
        layer.zero_grad(set_to_none=False)
        layer(sample.unsqueeze(0)).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
        layer.zero_grad()
    jacobian = torch.stack(rows)
    torch.testing.assert_close(entk_matrix(layer, x), jacobian @ jacobian.T)

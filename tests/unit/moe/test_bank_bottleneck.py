"""Bottlenecked experts: their widths, the exact budget, and what growth keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cl_benchmarks.networks import build_network
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.interventions.units import find_units
from dynmoe.moe import MoELayer
from dynmoe.moe.diagnostics import output_similarity, weight_similarity
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.widths import Shape, fit_widths


def make(
    dims: tuple[int, int] = (6, 5),
    hidden: int = 60,
    experts: int = 2,
    room: int = 12,
    **options: Any,
) -> MoELayer:
    torch.manual_seed(0)
    bank = registry.get("bank", "bottleneck").Config(**options)
    return MoELayer(*dims, hidden, num_experts=experts, max_experts=room, bank=bank).double()


def bank_of(layer: MoELayer) -> BottleneckBank:
    assert isinstance(layer.bank, BottleneckBank)
    return layer.bank


def controller_of(layer: nn.Module, optimizer: Any = None, **kinds: Any) -> GrowthController:
    parts = {"pruning": "utility", "init": "random"} | {
        k: kinds.pop(k) for k in ("pruning", "init") if k in kinds
    }
    configs = {kind: registry.get(kind, name).Config() for kind, name in parts.items()}
    return GrowthController(layer, optimizer, **configs, **kinds)


def train(layer: MoELayer, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(torch.randn(16, 6).double()) - 1).square().mean().backward()
        optimizer.step()


# widths -----------------------------------------------------------------------------------------


def test_the_cost_is_that_of_torchs_layers():
    widths, shape = (7, 3, 8), Shape(6, 5, 2.0)
    layers = [nn.Linear(6, 7), nn.Linear(7, 3), nn.Linear(3, 8), nn.Linear(8, 5, bias=False)]
    assert shape.cost(widths) == sum(p.numel() for m in layers for p in m.parameters())


@pytest.mark.parametrize("granularity", [1, 2, 4])
@pytest.mark.parametrize("expansion", [2.0, 4.0])
@pytest.mark.parametrize(("dims", "hidden"), [((128, 128), 256), ((100, 100), 200),
                                              ((128, 20), 256), ((512, 512), 1024)])  # fmt: skip
def test_ten_growths_spend_the_budget_to_the_last_parameter(dims, hidden, granularity, expansion):
    """Exactly, but for one case in 40 here, and never more: at worst 0.03 % are left."""
    shape = Shape(*dims, expansion)
    budget = shape.total(fit_widths(shape, hidden * (sum(dims) + 1), granularity))
    left = []
    for growth in range(1, 11):
        widths = fit_widths(shape, budget, granularity * (1 + growth))
        assert len(widths) == granularity * (1 + growth)
        left.append(budget - shape.total(widths))
        bottlenecks = [b for _, b, _ in widths]
        assert max(bottlenecks) - min(bottlenecks) <= 1
        expanded = sum(a + c for a, _, c in widths) / 2
        assert 0.6 < expanded / sum(bottlenecks) / expansion < 1.67 or max(bottlenecks) <= 3
    assert min(left) >= 0 and left.count(0) >= 9 and max(left) < 3e-4 * budget


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9))
def test_widths_never_cost_more_than_the_budget(dim_in, dim_out, hidden, experts):
    shape = Shape(dim_in, dim_out, 4.0)
    budget = hidden * (dim_in + dim_out + 1)
    widths = fit_widths(shape, budget, experts)
    if not widths:
        assert budget < experts * shape.cost((1, 1, 1))
    else:
        assert len(widths) == experts and min(min(w) for w in widths) >= 1
        assert shape.total(widths) <= budget


def test_a_layer_has_the_parameters_of_a_pool_at_first():
    """But for what whole units cannot reach."""
    pool = MoELayer(128, 128, 256, num_experts=2, max_experts=8)
    bottleneck = make((128, 128), 256, room=8)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (pool, bottleneck)]
    assert 0 <= counts[0] - counts[1] < 1e-3 * counts[0]


# growth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", registry.names("pruning"))
@pytest.mark.parametrize("init", ["random", "zero-output"])
def test_a_growth_changes_no_parameter_but_its_values(pruning, init):
    layer = make()
    bank, objects = bank_of(layer), {n: id(p) for n, p in layer.named_parameters()}
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    controller, budget = controller_of(layer, optimizer, pruning=pruning, init=init), bank.live
    for growth in range(5):
        train(layer, optimizer)
        event = controller.grow(growth, (torch.randn(20, 6).double(), None))
        assert {n: id(p) for n, p in layer.named_parameters()} == objects
        assert bank.live == budget == len(bank.weights) and len(bank.sizes) == 3 + growth
        assert event.hidden_sizes == {"": bank.hidden_sizes()}
    assert bank.widths[:7].tolist() == [list(widths) for widths in bank.sizes]


def wider(bank: BottleneckBank, expert: int, x: Tensor) -> list[Tensor]:
    """Activations of an expert's three layers."""
    w1, b1, w2, b2, w3, b3, _ = bank.maps(bank.weights).by_expert()[expert]
    first = torch.relu(x @ w1.T + b1)
    middle = torch.relu(first @ w2.T + b2)
    return [first, middle, torch.relu(middle @ w3.T + b3)]


def test_kept_units_keep_the_weights_between_them_and_their_moments():
    """With pruning `first`, the first units of each layer: corners of the matrices."""
    layer = make()
    bank, optimizer = bank_of(layer), torch.optim.Adam(layer.parameters(), 1e-2)
    train(layer, optimizer)
    layer(torch.randn(9, 6).double()).sum().backward()
    vectors = [bank.weights.detach(), bank.weights.grad, *(
        optimizer.state[bank.weights][key] for key in ("exp_avg", "exp_avg_sq"))]  # fmt: skip
    before = [copy.deepcopy(bank.maps(v.clone()).by_expert()) for v in vectors]
    mean = vectors[3].mean()
    controller_of(layer, optimizer, pruning="first").grow(1)
    after = [bank.maps(v).by_expert() for v in (
        bank.weights.detach(), bank.weights.grad,
        *(optimizer.state[bank.weights][key] for key in ("exp_avg", "exp_avg_sq")))]  # fmt: skip
    for expert, (first, middle, last) in enumerate(bank.sizes[:2]):
        corners = [(first, 6), (first,), (middle, first), (middle,), (last, middle), (last,),
                   (last, 5)]  # fmt: skip
        for old, new in zip(before, after, strict=True):
            for was, now, corner in zip(old[expert], new[expert], corners, strict=True):
                assert torch.equal(now, was[tuple(slice(n) for n in corner)])
                assert now.any()
    _, gradient, moments, second = after
    for piece in (*gradient[2], *moments[2]):
        assert not piece.any()
    for piece in second[2]:
        torch.testing.assert_close(piece, torch.full_like(piece, mean.item()))


def test_utility_keeps_the_units_that_matter():
    layer, x = make(experts=1), torch.randn(40, 6).double()
    bank = bank_of(layer)
    with torch.no_grad():
        for piece in bank.maps(bank.weights).by_expert()[0]:
            piece.abs_()
        w1, _, w2, _, w3, _, w4 = bank.maps(bank.weights).by_expert()[0]
        w2[:, :3] = 0.0  # nobody reads the first units of any layer
        w3[:, :1] = 0.0
        w4[:2] = 0.0
        important = wider(bank, 0, x)[0][:, 3:]
    controller_of(layer).grow(1, (x, None))
    assert bank.sizes[0][0] < w1.shape[0]
    first = wider(bank, 0, x)[0]
    alike = torch.isclose(first.unsqueeze(2), important.unsqueeze(1), rtol=0, atol=1e-12)
    assert alike.all(dim=0).any(dim=1).all()


def test_reinit_keeps_nothing_of_the_experts():
    layer = make()
    before = bank_of(layer).weights.detach().clone()
    controller_of(layer, pruning="reinit").grow(1)
    assert not torch.isin(bank_of(layer).weights, before).any()


@pytest.mark.parametrize("mode", ["constant", "per-growth"])
def test_a_growth_that_fails_leaves_no_trace(mode):
    layer = make()
    bank, optimizer = bank_of(layer), torch.optim.Adam(layer.parameters(), 1e-2)
    train(layer, optimizer)
    weights, state = bank.weights, copy.deepcopy(optimizer.state_dict())
    sizes, before = list(bank.sizes), copy.deepcopy(layer.state_dict())
    controller = controller_of(layer, optimizer, pruning="first", budget=Budget(mode=mode))

    def fail(_: dict[str, Tensor]) -> None:
        raise RuntimeError("a listener")

    controller.listeners.append(fail)
    with pytest.raises(RuntimeError, match="a listener"):
        controller.grow(1)
    assert bank.sizes == sizes and bank.weights is weights
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    train(layer, optimizer)


@pytest.mark.parametrize("units", [0, 20])
def test_with_a_budget_per_growth_old_experts_stay_and_new_ones_bring_their_own(units):
    layer, x = make(), torch.randn(7, 6).double()
    bank = bank_of(layer)
    sizes, outputs = list(bank.sizes), bank.expert_outputs(x)[:2]
    budget = Budget(mode="per-growth", units=units)
    controller_of(layer, budget=budget, pruning="random").grow(1)
    assert bank.sizes[:2] == sizes and len(bank.sizes) == 3
    # Other shapes of one product may be summed in another order.
    torch.testing.assert_close(bank.expert_outputs(x)[:2], outputs, rtol=0, atol=1e-12)
    own = bank.shape.cost(bank.sizes[2])
    expected = 20 * 12 if units else bank.shape.cost(sizes[0])
    assert 0 <= expected - own < 20 and bank.live == len(bank.weights)


def test_budgets_that_are_too_small_are_refused_and_nothing_is_touched():
    layer = make(hidden=3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(UserError, match="growing to 3 experts would leave some without hidden"):
        controller_of(layer).grow(1, (torch.randn(4, 6).double(), None))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    growth = registry.get("bank", "bottleneck").Config
    from dynmoe.growth.settings import GrowthSettings

    with pytest.raises(UserError, match="each expert needs at least 2"):
        GrowthSettings(bank=growth()).check_budget(19, 10)
    with pytest.raises(UserError, match=r"expansion=0.5 must be a number of at least 1"):
        make(expansion=0.5)


def test_compiled_equals_eager_before_and_after_a_growth():
    torch._dynamo.reset()
    layer, x = make(), torch.randn(7, 6).double()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for growth in range(2):
        if growth:
            controller_of(layer, pruning="random").grow(growth)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


# beside it --------------------------------------------------------------------------------------


def test_entries_of_experts_part_the_vector():
    bank = bank_of(make(experts=3))
    parts = [bank.entries(torch.tensor([e]))[-1][2] for e in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(bank.weights)))
    assert bank.shape.cost(bank.sizes[1]) == len(parts[1])
    assert len(bank.entries(torch.tensor([7]))[-1][2]) == 0


def test_its_units_are_left_alone_by_those_who_look_for_units():
    def make_block(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
        return make((dim_in, dim_out), hidden).float()

    def network(name: str) -> nn.Module:
        config = registry.get("network", name).Config(width=12, hidden=40)
        return build_network(config, (1, 16, 16), 5, make_block)

    with pytest.raises(UserError, match="those of bank bottleneck, and those that feed it, are le"):
        find_units(network("mlp"))  # the neck's units feed it
    assert [len(layer.outgoing) for layer in find_units(network("cnn"))] == [1, 1]


def test_similarities_compare_experts_of_different_widths():
    layer, x = make(experts=3), torch.randn(9, 6).double()
    for table in (weight_similarity(layer), output_similarity(layer, x, "cka")):
        assert table.shape == (3, 3) and table.isfinite().all()
        torch.testing.assert_close(table.diagonal(), torch.ones(3).double())


def test_a_reset_goes_back_to_the_first_widths():
    layer = make()
    sizes = list(bank_of(layer).sizes)
    controller_of(layer, pruning="first").grow(1)
    layer.reset_parameters()
    assert bank_of(layer).sizes == sizes and layer.num_experts == 2
    controller_of(layer, pruning="first", budget=Budget(mode="per-growth")).grow(1)
    with pytest.raises(UserError, match="the experts have grown from"):
        layer.reset_parameters()

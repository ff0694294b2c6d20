"""How new experts start: what preserves the layer's function, and what does not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.initialisation import choose_parents
from dynmoe.moe import MoELayer

CONSTANT, PER_GROWTH = Budget(), Budget(mode="per-growth", units=5)
SIZES = [[14], [7, 3, 4], [4, 5, 5]]


def make_layer(
    sizes: list[int], router: str = "cosine", gate_scale: str = "experts", room: int = 12
) -> MoELayer:
    config = registry.get("router", router).Config()
    layer = MoELayer(
        6, 5, sum(sizes), num_experts=len(sizes), max_experts=room, router=config,
        gate_scale=gate_scale,
    )  # fmt: skip
    layer.bank.set_hidden_sizes(sizes)
    return layer.double()


def make_controller(
    layer: MoELayer, init: str, budget: Budget, granularity: int = 1, pruning: str = "random"
) -> GrowthController:
    return GrowthController(
        layer,
        granularity=granularity,
        budget=budget,
        pruning=registry.get("pruning", pruning).Config(),
        init=registry.get("init", init).Config(),
    )


DENSE = ("cosine", "softmax")


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize("router", DENSE)
@pytest.mark.parametrize(
    ("init", "budget"),
    [
        ("zero-output", PER_GROWTH),
        ("zero-output", Budget(mode="per-growth", units=1)),
        ("duplicate", CONSTANT),
        ("duplicate", PER_GROWTH),
        ("duplicate", Budget(mode="per-growth", units=1)),
    ],
    ids=str,
)
def test_three_growths_preserve_the_function(init, budget, router, gate_scale, sizes, granularity):
    layer = make_layer(sizes, router, gate_scale)
    controller = make_controller(layer, init, budget, granularity)
    x = torch.randn(30, 6, dtype=torch.double)
    expected = layer(x).detach()
    for growth in range(1, 4):
        controller.grow(growth)
        assert layer.num_experts == len(sizes) + granularity * growth
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("init", "budget"), [("zero-output", PER_GROWTH), ("duplicate", CONSTANT)])
def test_float32_preserves_to_a_millionth(init, budget):
    layer = make_layer([9, 5]).float()
    x = torch.randn(200, 6)
    expected = layer(x).detach()
    make_controller(layer, init, budget, 2).grow(1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize("router", DENSE)
def test_zero_output_changes_no_more_than_the_cut_takes(router, gate_scale):
    """At a constant budget: where the units to be cut are silent, nothing changes."""
    layer = make_layer([6, 6], router, gate_scale)
    with torch.no_grad():
        layer.bank.w_out[:, [3, 4, 5, 9, 10, 11]] = 0.0
    x = torch.randn(30, 6, dtype=torch.double)
    expected = layer(x).detach()
    make_controller(layer, "zero-output", CONSTANT, 2, pruning="first").grow(1)
    assert layer.bank.hidden_sizes() == [3, 3, 3, 3]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [CONSTANT, PER_GROWTH], ids=str)
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
def test_random_does_not_preserve_the_function(budget, gate_scale):
    layer = make_layer([7, 7], gate_scale=gate_scale)
    x = torch.randn(30, 6, dtype=torch.double)
    before = layer(x).detach()
    make_controller(layer, "random", budget).grow(1)
    assert (layer(x) - before).norm() > 0.05 * before.norm()


@pytest.mark.parametrize("init", registry.names("init"))
@pytest.mark.parametrize("k", [1, 2])
def test_sparse_gates_do_not_shrink_with_the_number_of_experts(init, k):
    """Experts outside any new family keep their weights: their samples' gate scale stays k."""
    layer = MoELayer(
        6, 5, 24, num_experts=4, max_experts=5, router=registry.get("router", "topk").Config(k=k)
    )
    w_out, b_out = layer.bank.w_out.detach().clone(), layer.bank.b_out.detach().clone()
    make_controller(layer, init, PER_GROWTH).grow(1)  # the first expert is the parent
    assert torch.equal(layer.bank.w_out[:, 6:24], w_out[:, 6:])
    assert torch.equal(layer.bank.b_out[1:4], b_out[1:4])


@pytest.mark.parametrize("init", registry.names("init"))
def test_gate_scale_is_right_where_a_sparse_router_starts_with_fewer_experts_than_k(init):
    layer = MoELayer(
        6, 5, 8, num_experts=2, max_experts=6, router=registry.get("router", "topk").Config(k=3)
    )
    b_out = layer.bank.b_out.detach().clone()
    make_controller(layer, init, PER_GROWTH, 2).grow(1)
    factor = {"random": 1.0, "duplicate": 2 / 3, "zero-output": 2 * 2 / 3}[init]
    torch.testing.assert_close(layer.bank.b_out[:2], b_out[:2] * factor)


# families -----------------------------------------------------------------------------------------


def test_the_largest_experts_are_parents_first_each_once_before_any_twice():
    assert choose_parents([3, 9, 5], 2) == [1, 2]
    assert choose_parents([4, 4], 5) == [0, 1, 0, 1, 0]
    assert choose_parents([2], 3) == [0, 0, 0]


@pytest.mark.parametrize("budget", [CONSTANT, PER_GROWTH], ids=str)
@pytest.mark.parametrize("init", ["zero-output", "duplicate"])
@pytest.mark.parametrize("granularity", [1, 3, 5])
def test_families_share_row_and_gate(init, budget, granularity):
    layer = make_layer([8, 10])
    x = torch.randn(9, 6, dtype=torch.double)
    before, rows = layer.router(x).gates, layer.router.weight.detach().clone()
    make_controller(layer, init, budget, granularity).grow(1)
    after = layer.router(x).gates
    parents = choose_parents([8, 10], granularity)
    family = Counter([0, 1, *parents])
    for expert, parent in enumerate([0, 1, *parents]):
        assert torch.equal(layer.router.weight[expert], rows[parent])
        expected = before[:, parent] / family[parent]
        torch.testing.assert_close(after[:, expert], expected, rtol=1e-12, atol=1e-12)
    assert not after[:, 2 + granularity :].any()


def test_random_draws_new_rows_and_all_of_them_where_asked():
    for which, changed in (("new", [False, False, True]), ("all", [True, True, True])):
        layer = make_layer([8, 10], room=5)
        layer.router.logit_shift[:2] = 0.5
        rows = layer.router.weight.detach().clone()
        controller = make_controller(layer, "random", CONSTANT)
        controller.init = registry.get("init", "random").Config(router=which).build()
        controller.grow(1)
        assert (layer.router.weight != rows).any(dim=1).tolist() == [*changed, False, False]
        assert (
            layer.router.logit_shift.tolist()
            == [0.0 if c else 0.5 for c in changed[:2]] + [0.0] * 3
        )


def test_new_experts_are_silent_with_zero_output():
    layer = make_layer([8, 10])
    make_controller(layer, "zero-output", PER_GROWTH, 2).grow(1)
    assert not layer.bank.w_out[:, 18:].any() and not layer.bank.b_out[2:4].any()
    assert layer.bank.w_in[18:].abs().min(dim=1).values.gt(0).all()


def test_copies_of_a_unit_have_unequal_shares_and_part_in_training():
    layer = make_layer([5])
    weight = layer.bank.w_out.detach().clone()
    make_controller(layer, "duplicate", PER_GROWTH).grow(1)
    bank = layer.bank
    mine, copies = bank.w_out[:, :5], bank.w_out[:, 5:]
    assert torch.equal(bank.w_in[:5], bank.w_in[5:])
    share = (mine / (mine + copies)).detach()
    torch.testing.assert_close(share, share[:1].expand_as(share))  # one share for a whole unit
    assert (share > 0.2).all() and (share < 0.8).all() and share[0].std() > 0.01
    torch.testing.assert_close(mine + copies, weight)  # half the gate each, times two experts
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x: Tensor = torch.randn(50, 6, dtype=torch.double)
    (layer(x) - x[:, :5]).square().mean().backward()
    optimizer.step()
    assert ((bank.w_in[:5] - bank.w_in[5:]).norm(dim=1) > 1e-5).any()


@pytest.mark.parametrize("units", [3, 5, 8])
def test_children_copy_their_parents_first_units_and_fill_up_with_silent_ones(units):
    layer = make_layer([5])
    make_controller(layer, "duplicate", Budget(mode="per-growth", units=units)).grow(1)
    bank, copied = layer.bank, min(units, 5)
    assert torch.equal(bank.w_in[5 : 5 + copied], bank.w_in[:copied])
    assert not bank.w_out[:, 5 + copied :].any()
    assert bank.w_in[5 + copied :].abs().amin(dim=1).gt(0).all()


def test_dealing_splits_a_parents_units_between_the_family():
    layer = make_layer([4, 7])
    units = {tuple(row) for row in layer.bank.w_in[4:].tolist()}
    make_controller(layer, "duplicate", CONSTANT).grow(1)
    assert layer.bank.hidden_sizes() == [4, 4, 3]
    assert {tuple(row) for row in layer.bank.w_in[4:].tolist()} == units


def test_dealing_refuses_parents_with_too_few_units():
    layer = make_layer([1, 3])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(UserError, match="expert 0 has 1 hidden units and cannot share"):
        make_controller(layer, "duplicate", CONSTANT, 2).grow(1)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("init", registry.names("init"))
def test_too_few_units_for_the_experts_are_refused(init):
    with pytest.raises(UserError, match="without hidden units"):
        make_controller(make_layer([2, 1]), init, CONSTANT, 2).grow(1)

"""What a growth may change in parameters and optimizer state, and what it must not.

Units are tagged: unit j's weights and optimizer state hold whole numbers that name it, far from
any new weight: after a growth each unit's origin can be read from the unit itself.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import MoELayer

D_IN, D_OUT, UNITS, ROOM = 3, 2, 24, 9
FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
}
INITS = {
    "random, new rows": registry.get("init", "random").Config(router="new"),
    "random, whole router": registry.get("init", "random").Config(router="all"),
    "zero-output": registry.get("init", "zero-output").Config(),
    "duplicate": registry.get("init", "duplicate").Config(),
}


def make_model(experts: int = 2, room: int = ROOM) -> nn.Sequential:
    """A plain layer under an MoE layer, in float64 so that whole numbers stay exact."""
    moe = MoELayer(D_IN, D_OUT, UNITS, num_experts=experts, max_experts=room)
    return nn.Sequential(nn.Linear(4, D_IN), moe).double()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        x = torch.randn(64, 4, dtype=torch.double)
        loss = (model(x) - x[:, :D_OUT]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def tag(layer: MoELayer, optimizer: Optimizer) -> None:
    """Give every unit and every expert row, and their optimizer state, values of their own."""
    bank, names = layer.bank, 100.0 + torch.arange(len(layer.bank.segment))
    bank.w_in.copy_(torch.randint(-9, 9, bank.w_in.shape))
    bank.w_in[:, 0] = names
    bank.b_in.copy_(torch.randint(-9, 9, bank.b_in.shape))
    bank.w_out.copy_(names * torch.tensor([1.0, -3.0]).unsqueeze(1))
    for parameter in layer.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.copy_(torch.randperm(value.numel()).view(value.shape) + 1.0)


class Snapshot:
    """Copies of a layer's parameters and optimizer state by name, and of its hidden activations."""

    def __init__(self, layer: MoELayer, optimizer: Optimizer, x: Tensor) -> None:
        self.parameters = {n: p.detach().clone() for n, p in layer.named_parameters()}
        self.state: dict[str, dict[str, Any]] = {
            n: copy.deepcopy(optimizer.state[p]) if p in optimizer.state else {}
            for n, p in layer.named_parameters()
        }
        self.hidden = layer.bank.hidden(x).detach()
        self.experts = layer.num_experts


def origins(before: Snapshot, after: Snapshot) -> Tensor:
    """[H'] the old unit that each unit was, by its tag; -1 for fresh units."""
    names = after.parameters["bank.w_in"][:, 0]
    origin = torch.where(names >= 100, names - 100, torch.full_like(names, -1)).long()
    assert (names[origin < 0].abs() <= D_IN**-0.5).all() and origin.max() < UNITS * ROOM
    return origin


def first_copies(origin: Tensor) -> Tensor:
    """[H'] bool: units that are taken over, each old unit counted once."""
    seen = [o >= 0 and o not in origin[:i].tolist() for i, o in enumerate(origin.tolist())]
    return torch.tensor(seen)


def check_units(before: Snapshot, after: Snapshot, origin: Tensor, exact_outputs: bool) -> None:
    """Weights and hidden activations of units taken over are what they were, bit by bit."""
    new, old = origin >= 0, origin[origin >= 0]
    assert torch.equal(after.hidden[:, new], before.hidden[:, old])
    for name in ("bank.w_in", "bank.b_in"):
        assert torch.equal(after.parameters[name][new], before.parameters[name][old])
    w_out, old_w_out = (
        after.parameters["bank.w_out"][:, new],
        before.parameters["bank.w_out"][:, old],
    )
    if exact_outputs:
        assert torch.equal(w_out, old_w_out)
    else:  # each unit's outputs are scaled as one
        ratio = w_out / old_w_out
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert (ratio > 0).all()


def check_state(before: Snapshot, after: Snapshot, moved: dict[str, Tensor], moments: str) -> None:
    """State moves with its unit or row; what starts over starts from neutral moments.

    `moved` holds, for each parameter, which entry each entry was, or -1 where state restarts.
    """
    for name, origin in moved.items():
        axis = 1 if name == "bank.w_out" else 0
        old_state, new_state = before.state[name], after.state[name]
        assert old_state.keys() == new_state.keys()
        for key, value in new_state.items():
            if key not in (*FIRST, *SECOND):
                assert key == "step" and value == old_state[key]
                continue
            assert value.shape == after.parameters[name].shape
            old = old_state[key].movedim(axis, 0)
            value = value.movedim(axis, 0)
            kept = origin >= 0
            assert torch.equal(value[kept], old[origin[kept]]), (name, key)
            rows = (
                old if name.startswith("bank.w") or name == "bank.b_in" else old[: before.experts]
            )
            neutral = rows.mean().item() if key in SECOND and moments == "mean" else 0.0
            torch.testing.assert_close(
                value[~kept], torch.full_like(value[~kept], neutral), msg=(name, key)
            )


growths = st.lists(
    st.tuples(
        st.integers(1, 2),
        st.sampled_from(registry.names("pruning")),
        st.sampled_from(list(INITS)),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=120, deadline=None)
@given(
    growths,
    st.integers(1, 3),
    st.one_of(
        st.just(Budget()), st.builds(Budget, mode=st.just("per-growth"), units=st.integers(0, 7))
    ),
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from(["mean", "zero"]),
)
def test_any_sequence_of_growths(growths, experts, budget, optimizer_name, moments):
    torch.manual_seed(0)
    model = make_model(experts)
    layer: MoELayer = model[1]
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-5, 5, (8, D_IN)).double()
    probe = torch.randn(8, 4, dtype=torch.double), None
    for count, (granularity, pruning, init, steps) in enumerate(growths, start=1):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)  # training on tags would diverge
        train(model, optimizer, steps)
        tag(layer, optimizer)
        before, parameters = Snapshot(layer, optimizer, x), list(model.parameters())
        sizes = layer.bank.hidden_sizes()
        controller = GrowthController(
            model,
            optimizer,
            granularity=granularity,
            budget=budget,
            pruning=registry.get("pruning", pruning).Config(),
            init=INITS[init],
            moments=moments,
            generator=generator,
        )
        event = controller.grow(count, probe)
        after = Snapshot(layer, optimizer, x)

        # The budget is exact.
        grown = layer.bank.hidden_sizes()
        numel = {n: p.numel() for n, p in before.parameters.items()}
        new_units = len(layer.bank.segment) - sum(sizes)
        if budget.mode == "constant":
            assert new_units == 0
            assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        else:
            assert new_units == granularity * (budget.units or sizes[0])
            assert grown[: len(sizes)] == sizes
        total = sum(p.numel() for p in layer.parameters())
        assert total == sum(numel.values()) + new_units * (D_IN + 1 + D_OUT)
        assert event.parameters == total + sum(p.numel() for p in model[0].parameters())
        assert layer.num_experts == len(grown) == len(sizes) + granularity and min(grown) >= 1

        # Units taken over are unchanged, and their optimizer state is with them.
        origin = origins(before, after)
        check_units(before, after, origin, exact_outputs=init.startswith("random"))
        units = torch.where(first_copies(origin), origin, -1)
        assert torch.equal(units[units >= 0], torch.arange(len(units))[units >= 0])  # none moved
        rows = torch.arange(ROOM)
        rows[len(sizes) : len(grown)] = -1
        router_rows = rows.clone()
        if init == "random, whole router":
            router_rows[: len(grown)] = -1
        moved = {name: units for name in ("bank.w_in", "bank.b_in", "bank.w_out")}
        moved |= {"bank.b_out": rows, "router.weight": router_rows}
        check_state(before, after, moved, moments)
        if init == "duplicate":
            assert set(origin[origin >= 0].tolist()) == set(range(sum(sizes)))  # nothing is cut
        else:
            kept = sum(
                0 if pruning == "reinit" and after < before else min(before, after)
                for before, after in zip(sizes, grown, strict=False)
            )
            assert first_copies(origin).sum() == (origin >= 0).sum() == kept

        # Rows of experts that stay, or are not there yet, are unchanged.
        router = before.parameters["router.weight"], after.parameters["router.weight"]
        stay = router_rows >= 0
        assert torch.equal(router[0][stay], router[1][stay])
        assert (router[0][~stay] != router[1][~stay]).any(dim=1).all()
        assert layer.created[len(sizes) : len(grown)].tolist() == [1] * granularity

        # The optimizer holds the model's parameters and no other.
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in model.parameters()]
        assert {id(p) for p in optimizer.state} <= {id(p) for p in held}


@pytest.mark.parametrize("growths", [1, 2])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("mode", ["constant", "per-growth"])
def test_training_goes_on_and_reaches_every_unit(
    mode, optimizer_name, steps_before, growths, device
):
    """Also without a step before the first growth, or between two."""
    model = make_model().to(device)
    layer: MoELayer = model[1]
    layer.bank.act = nn.Tanh()  # no unit is off for every sample
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    pruning = registry.get("pruning", "random").Config()
    controller = GrowthController(model, optimizer, budget=Budget(mode=mode), pruning=pruning)

    def step() -> None:
        x = torch.randn(64, 4, dtype=torch.double, device=device)
        optimizer.zero_grad()
        (model(x) - x[:, :D_OUT]).square().mean().backward()
        optimizer.step()

    for _ in range(steps_before):
        step()
    for growth in range(growths):
        controller.grow(growth)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step()
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        if parameter.shape[0] == ROOM:
            changed = changed[: 2 + growths]
        assert changed.all(), name


def test_fresh_units_start_with_their_neighbours_step_size():
    """With zero second moments their first step is many learning rates; with the mean it is not."""
    steps = {}
    for moments in ("mean", "zero"):
        torch.manual_seed(1)
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        train(model, optimizer, 200)
        for state in optimizer.state.values():
            state["step"].fill_(10_000)  # bias correction has faded
        pruning = registry.get("pruning", "reinit").Config()
        GrowthController(model, optimizer, pruning=pruning, moments=moments).grow(1)
        layer = model[1]
        fresh = [layer.router.weight, layer.bank.w_in, layer.bank.b_in, layer.bank.w_out]
        before = [p.detach().clone() for p in fresh]
        train(model, optimizer)
        changes = [(p.detach() - b).abs() / 1e-3 for b, p in zip(before, fresh, strict=True)]
        steps[moments] = [change[change > 0].mean().item() for change in changes]
    assert steps["zero"] == pytest.approx([0.1 / 0.001**0.5] * 4, rel=1e-2)
    assert max(steps["mean"]) < 1.5


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize(
    ("mode", "hidden", "room", "message"),
    [
        ("constant", 24, 3, "cannot grow to 4 experts: .* at most 3"),
        ("per-growth", 24, 3, "cannot grow to 4 experts: .* at most 3"),
        ("constant", 3, 9, "without hidden units"),
    ],
)
def test_a_growth_that_fails_in_one_layer_changes_none(mode, hidden, room, message):
    layers = [
        MoELayer(4, 4, 24, num_experts=2, max_experts=9),
        MoELayer(4, 2, hidden, num_experts=2, max_experts=room),
    ]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    before = state_of(model, optimizer)
    pruning = registry.get("pruning", "random").Config()
    budget = Budget(mode=mode)
    controller = GrowthController(model, optimizer, granularity=2, pruning=pruning, budget=budget)
    with pytest.raises(UserError, match=message):
        controller.grow(1)
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
    assert not controller.events and layers[0].num_experts == 2
    train(model, optimizer)  # nothing is half done


def test_per_growth_replaces_parameters_in_their_own_group_and_keeps_frozen_ones_frozen():
    model = make_model()
    bank = model[1].bank
    bank.b_in.requires_grad_(False)
    groups = [
        {"params": [bank.w_in, bank.b_in], "lr": 0.5},
        {"params": [p for p in model.parameters() if p is not bank.w_in and p is not bank.b_in]},
    ]
    optimizer = torch.optim.SGD(groups, 0.1)
    pruning = registry.get("pruning", "first").Config()
    GrowthController(model, optimizer, budget=Budget(mode="per-growth"), pruning=pruning).grow(1)
    first, second = optimizer.param_groups
    assert first["lr"] == 0.5 and second["lr"] == 0.1
    assert [id(p) for p in first["params"]] == [id(bank.w_in), id(bank.b_in)]
    assert any(p is bank.w_out for p in second["params"])
    assert bank.w_in.requires_grad and not bank.b_in.requires_grad


@pytest.mark.parametrize("saved", [UNITS + 12, UNITS])
@pytest.mark.parametrize("grown", [0, 2])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_any_pool_size_is_loaded_plainly(saved, grown, assign):
    """Into a fresh model, and into one that has grown further since."""
    model, other = make_model(), make_model()
    budget = Budget(mode="per-growth")
    if saved > UNITS:
        GrowthController(model, budget=budget).grow(1)
    for growth in range(grown):
        GrowthController(other, budget=budget).grow(growth)
    optimizer = torch.optim.Adam(other.parameters())
    state = copy.deepcopy(model.state_dict())
    other.load_state_dict(state, assign=assign)
    x = torch.randn(9, 4, dtype=torch.double)
    assert torch.equal(other(x), model(x)) and len(other[1].bank.segment) == saved
    if not assign:  # which replaces Parameters, in all modules of torch
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert held == [id(p) for p in other.parameters()]
        train(other, optimizer)
        assert not torch.equal(other[1].bank.w_in, model[1].bank.w_in)

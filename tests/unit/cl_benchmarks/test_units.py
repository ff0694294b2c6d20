"""Finding a network's hidden units, looking at them, and renewing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from intervention_helpers import NETWORKS, Loop, batch, conv, make, mlp, moe, seeded, weights
from torch import Tensor, nn

from cl_benchmarks.networks import build_network
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.interventions.resetting import move_to_bias
from dynmoe.interventions.units import UnitLayer, find_units, renewed, watch
from dynmoe.moe import MoELayer, routing_inputs
from dynmoe.registry import get


def layers_of(model: nn.Module) -> dict[str, UnitLayer]:
    return {layer.name: layer for layer in find_units(model)}


def ready(network: Callable[[], nn.Module]) -> nn.Module:
    """With running statistics that are not those of the start, in evaluation mode, float64."""
    torch.manual_seed(0)
    model = network().double()
    for number in range(3):
        model(batch(number)[0].double())
    return model.eval()


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("mlp", {"1": 12, "3": 8}),
        ("conv", {"0": 6, "4": 4, "7": 8}),
        ("moe", {"1": 8, "3": 8, "3.shared": 4}),
    ],
)
def test_finds_every_hidden_layer(network: str, expected: dict[str, int]) -> None:
    found = {name: layer.units for name, layer in layers_of(NETWORKS[network]()).items()}
    assert found == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_silent_units_have_no_say_and_others_have(network: str) -> None:
    """What feeds a unit matters until its outgoing weights are 0; then nothing of it does."""
    images = batch(7)[0].double()
    for name in layers_of(NETWORKS[network]()):
        for silent in (False, True):
            model = ready(NETWORKS[network])
            layer = layers_of(model)[name]
            index = torch.arange(layer.units)[1:3]
            if silent:
                layer.silence(index)
            before = model(images)
            with torch.no_grad():
                for slot in layer.incoming:
                    slot.parameter[index] += 5.0 + torch.rand_like(slot.parameter[index])
            after = model(images)
            routed = name == "1" and network == "moe"  # its units also go to the router
            assert torch.allclose(before, after, atol=1e-12) == (silent and not routed), name


@pytest.mark.parametrize("network", NETWORKS)
def test_activations_are_those_of_the_pass(network: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]().train()
    seen: dict[int, Tensor] = {}
    layers = find_units(model)
    for number, layer in enumerate(layers):
        watch(layer, number, seen.__setitem__)
    real: list[Tensor] = []
    for module in model:  # type: ignore[attr-defined]
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, y: real.append(y.detach().clone()))
        if isinstance(module, MoELayer):
            module.register_forward_hook(
                lambda m, i, y: real.extend([m.bank.hidden(i[0]), m.shared.hidden(i[0])])
            )
    model(batch(3)[0])
    assert len(seen) == len(real) == len(layers)
    for number, value in enumerate(real):
        rows = value.movedim(1, -1).flatten(0, -2)
        assert seen[number].shape == rows.shape and torch.equal(seen[number], rows)


def test_watching_leaves_acting_and_evaluation_out() -> None:
    model, seen = mlp(), []
    watch(find_units(model)[0], 0, lambda number, h: seen.append(h))
    model.eval()(batch(0)[0])
    with torch.no_grad():
        model.train()(batch(0)[0])
    assert not seen
    handle = watch(find_units(model)[1], 1, lambda number, h: seen.append(h))
    model(batch(0)[0])
    assert [tuple(h.shape) for h in seen] == [(16, 12), (16, 8)]
    assert not any(h.requires_grad for h in seen)
    handle.remove()
    model(batch(0)[0])
    assert len(seen) == 3


class Padded(nn.Module):
    """Sentences [B, T, 6] with padding, which its MoE layer gets to know in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer = MoELayer(6, 6, 8, num_experts=2, max_experts=4, shared_hidden=4)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.way == "context":
            return self.head(self.layer(x))
        y = self.layer(x, mask=mask) if self.way == "keyword" else self.layer(mask=mask, x=x)
        return self.head(y)


@pytest.mark.parametrize("way", ["keyword", "keywords alone", "context"])
@pytest.mark.parametrize("name", ["redo", "cbp", "snr"])
def test_padding_has_no_say_in_which_units_are_reset(name: str, way: str) -> None:
    """What stands in it may be NaN: the network learns as from the real positions alone."""
    options = {"redo": {"tau": 0.9, "period": 1}, "snr": {"limit": 1, "period": 1}}
    ends, real = [], torch.arange(5) < torch.tensor([[3], [5], [0]])
    for padded in (True, False):
        torch.manual_seed(0)
        model = Padded(way).double()
        model.layer.bank.b_in.data[1] = -9.0  # a unit that never fires
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        intervention = make(name, **options.get(name, {"rate": 0.5, "maturity": 0}))
        intervention.attach(model, optimizer, seeded())
        for number in range(4):
            x = torch.randn(3, 5, 6, generator=seeded(number), dtype=torch.double)
            x[~real] = float("nan")
            x, mask = (x, real) if padded else (x[real].unsqueeze(0), torch.ones(1, 8))
            optimizer.zero_grad()
            with routing_inputs(model, mask=mask):
                model(x, mask)[mask.bool()].square().mean().backward()
            optimizer.step()
            intervention.step_done()
        ends.append(weights(model))
    torch.testing.assert_close(*ends)
    assert ends[0]["layer.bank.b_in"][1] > -1  # it was renewed


def test_an_activation_that_works_in_place_is_not_disturbed() -> None:
    torch.manual_seed(0)
    plain, placed = (
        nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.ReLU(inplace=p), nn.Linear(6, 2))
        for p in (False, True)
    )
    placed.load_state_dict(plain.state_dict())
    seen: dict[int, Tensor] = {}
    watch(find_units(placed)[0], 0, seen.__setitem__)
    images = batch(0)[0]
    assert torch.equal(plain(images), placed(images))
    assert torch.equal(seen[0], plain[:3](images))


@pytest.mark.parametrize("network", NETWORKS)
def test_fresh_weights_lie_in_torchs_range(network: str) -> None:
    model = NETWORKS[network]().train()
    model(batch(0)[0])
    for layer in find_units(model):
        with torch.no_grad():
            for slot in layer.incoming:
                slot.parameter.fill_(9.0)
            for norm in layer.norms:
                norm.weight.fill_(9.0)  # type: ignore[operator, union-attr]
        index = torch.tensor([0, 2])
        layer.draw_incoming(index, seeded())
        weight = layer.incoming[0].parameter
        bound = weight[0].numel() ** -0.5
        assert weight[index].abs().max() <= bound and weight[index].std() > 0.3 * bound
        others = [i for i in range(layer.units) if i not in (0, 2)]
        for slot in layer.incoming:
            assert (slot.parameter[others] == 9).all() and not (slot.parameter[index] == 9).any()
        for norm in layer.norms:
            expected = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            for name, value in expected.items():
                assert (getattr(norm, name)[index] == value).all(), name
            assert (norm.weight[others] == 9).all()  # type: ignore[index]
            assert (norm.running_mean[others] != 0).all()  # type: ignore[index]


@pytest.mark.parametrize("network", NETWORKS)
def test_moments_restart_for_a_units_weights_alone(network: str) -> None:
    """Those are the entries that change if its incoming and outgoing weights are marked."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    for layer in find_units(model):
        index = torch.tensor([1, 3])
        marks = {p: torch.zeros_like(p) for p in model.parameters()}
        for slot in (*layer.incoming, *layer.outgoing):
            marks[slot.parameter].index_fill_(slot.axis, slot.entries(index), 1.0)
        for norm in layer.norms:
            for p in norm.parameters():
                marks[p][index] = 1.0
        for state in optimizer.state.values():
            state["exp_avg"].fill_(2.0)
            state["exp_avg_sq"].fill_(3.0)
        layer.restart_moments(index, optimizer)
        for p, mark in marks.items():
            state = optimizer.state[p]
            assert torch.equal(state["exp_avg"], 2 * (1 - mark))
            assert torch.equal(state["exp_avg_sq"], 3 * (1 - mark))
            assert state["step"] == 1
        assert sum(float(m.sum()) for m in marks.values()) > 0


def test_a_flattened_map_gives_a_unit_all_its_positions() -> None:
    (slot,) = layers_of(conv())["4"].outgoing
    assert slot.repeat == 4 and slot.entries(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9,
                                                                               10, 11]  # fmt: skip
    rows = slot.unit_major(slot.parameter)
    assert torch.equal(rows[2], slot.parameter[:, 8:12].T.reshape(-1))


@pytest.mark.parametrize("reader", ["linear", "moe"])
def test_flattened_tokens_give_a_unit_its_place_in_each(reader: str) -> None:
    """[B, 5, 8] tokens with 6 units each: what is silenced is what a dead unit no longer says."""
    torch.manual_seed(0)
    last = nn.Linear(30, 4) if reader == "linear" else MoELayer(30, 4, 8, shared_hidden=4)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), last).double().eval()
    tokens, index = torch.randn(16, 5, 8, dtype=torch.double), torch.tensor([1, 4])
    layer = find_units(model)[0]
    with torch.no_grad():
        layer.incoming[0].parameter[index] = 0
        layer.incoming[1].parameter[index] = torch.tensor([0.5, 0.25]).double()
    alive, before = model[:3](tokens), model(tokens)  # type: ignore[index]
    slot = layer.outgoing[0]
    assert torch.equal(
        alive[:, slot.entries(index)], alive.new([0.5] * 5 + [0.25] * 5).expand(16, 10)
    )
    places = torch.arange(30).expand_as(slot.parameter)
    assert torch.equal(slot.unit_major(places)[4], places[:, 4::6].T.reshape(-1))
    if reader == "linear":
        with torch.no_grad():
            move_to_bias(slot, index, torch.tensor([0.5, 0.25]))
        layer.silence(index)
        torch.testing.assert_close(model(tokens), before)
    with torch.no_grad():
        for incoming in layer.incoming:
            incoming.parameter[index] = 0
    before = model(tokens)
    layer.silence(index)
    torch.testing.assert_close(model(tokens), before)
    assert (slot.parameter == 0).sum() == 10 * len(slot.parameter)


class Odd(nn.Module):
    """Networks in which some outputs are no units."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.act, self.other = nn.ReLU(), nn.ReLU()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.kind == "residual":
            x = self.act(self.a(x))
            return self.c(x + self.other(self.b(x)))
        if self.kind == "shared layer":
            return self.c(self.act(self.a(self.act(self.a(x)))))
        if self.kind == "shared norm":
            return self.c(self.act(self.norm(self.b(self.act(self.norm(self.a(x)))))))
        if self.kind == "all axes":
            return self.c(self.act(self.a(x)).flatten(0).view(-1, 32))
        return self.c(F.relu(self.a(x)))


@pytest.mark.parametrize(
    "kind", ["residual", "shared layer", "shared norm", "all axes", "functional"]
)
def test_outputs_that_are_no_units_are_left_out(kind: str) -> None:
    with pytest.raises(UserError, match="no hidden units that can be found"):
        find_units(Odd(kind))


def test_flattening_before_the_activation_is_left_out() -> None:
    before = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.ReLU(), nn.Linear(48, 3))
    after = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(UserError):
        find_units(before)
    assert find_units(after)[0].outgoing[0].repeat == 16


def test_a_network_that_cannot_be_traced_is_refused_in_one_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="cannot be traced") as error:
        find_units(Branch())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "least"), [("cnn", 4), ("mlp", 2), ("resnet18", 10)])
def test_our_networks_have_units(name: str, least: int) -> None:
    config = get("network", name).Config(width=8, hidden=12)
    model = build_network(config, (3, 16, 16), 5)
    layers = find_units(model)
    assert len(layers) == least
    assert all(layer.outgoing and layer.units > 0 for layer in layers)


@pytest.mark.parametrize("budget", [Budget(), Budget(mode="per-growth")], ids=str)
def test_growth_renews_units_and_is_noticed(budget: Budget) -> None:
    model = moe()
    pruning = get("pruning", "utility").Config()
    controller = GrowthController(model, granularity=2, budget=budget, pruning=pruning)
    before: list[dict[str, Tensor]] = []
    controller.listeners.append(before.append)
    layers = layers_of(model)
    old = {n: s.parameter.detach().clone() for n, s in
           ((name, layer.incoming[0]) for name, layer in layers.items())}  # fmt: skip
    controller.grow(1, batch(0))
    for name, layer in layers.items():
        now, was = layer.incoming[0].parameter, old[name]
        expected = [i >= len(was) or not torch.equal(now[i], was[i]) for i in range(len(now))]
        assert renewed(layer, model, before[0]).tolist() == expected
        assert any(expected) == (name == "3")


@pytest.mark.parametrize("name", ["redo", "cbp", "snr"])
def test_frozen_layers_and_what_they_read_are_left_alone(name: str) -> None:
    """Of three hidden layers, the first is frozen; the second one feeds a frozen one."""

    def network() -> nn.Module:
        layers = [nn.Linear(16, 16) for _ in range(4)]
        layers[0].requires_grad_(False), layers[2].requires_grad_(False)
        hidden = [m for layer in layers for m in (layer, nn.ReLU())]
        return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), *hidden, nn.Linear(16, 3))

    options = {"redo": {"tau": 0.99, "period": 1}, "snr": {"limit": 1, "period": 1}}
    loop = Loop(network, name, **options.get(name, {"rate": 0.5, "maturity": 0}))
    before, lasting = weights(loop.model), loop.intervention.layers[-1]
    drawn: list[UnitLayer] = []
    plain = loop.intervention.reset
    loop.intervention.reset = lambda layer, index: (drawn.append(layer), plain(layer, index))
    loop.run(3)
    for parameter_name, parameter in loop.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[parameter_name]), parameter_name
    assert drawn and {layer.name for layer in drawn} == {lasting.name}
    loop.model[3].requires_grad_(True)
    loop.run(6)
    assert len({layer.name for layer in drawn}) > 1


@pytest.mark.parametrize("name", ["redo", "cbp", "snr"])
def test_a_network_with_frozen_hidden_layers_alone_is_refused(name: str) -> None:
    model = mlp()
    model[3].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(UserError, match=f"{name}: every layer of hidden units is frozen"):
        make(name).attach(model, torch.optim.SGD(model.parameters()), seeded())

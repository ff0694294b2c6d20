"""Growth of every registered bank: in the midst of training, and what it preserves."""

from __future__ import annotations

import copy

import pytest
import torch
from bank_cases import BANKS, EXPERTS, HIDDEN, ROOM, WITH_UNITS, WITHOUT_UNITS, loop, samples
from bank_cases import make_layer as make
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import MoELayer

CONSTANT, PER_GROWTH = Budget(), Budget(mode="per-growth", units=3)
BUDGETS = pytest.mark.parametrize("budget", [CONSTANT, PER_GROWTH], ids=["constant", "per-growth"])
IN_PLACE = [name for name in BANKS if name != "bottleneck"]  # its own: test_bank_bottleneck.py
GROWTHS = [(name, init) for name in BANKS for init in ("random", "zero-output")]
GROWTHS += [(name, "duplicate") for name in WITH_UNITS]


def controller_of(layer: MoELayer, init: str, optimizer=None, pruning="utility", **options):
    config = registry.get("init", init).Config(
        **({"router": "new"} if init == "random" else {})  # the old experts' rows stay
    )
    pruning = registry.get("pruning", pruning).Config()
    return GrowthController(layer, optimizer, init=config, pruning=pruning, **options)


def train(layer: MoELayer, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        x = samples(layer.bank.name, 8)
        y = layer(x)
        optimizer.zero_grad()
        (y - 1).square().mean().backward()
        optimizer.step()


def entries(layer: MoELayer) -> dict[str, int]:
    """Name of each parameter of the bank -> its axis of units or experts."""
    ids = {id(p): 0 for p in layer.bank.expert_rows()}
    if layer.bank.name in WITH_UNITS:
        ids |= {id(getattr(layer.bank, key)): axis for key, axis in layer.bank.unit_axes()}
    if layer.bank.name == "bottleneck":
        ids[id(layer.bank.weights)] = 0
    assert len(ids) == len(list(layer.bank.parameters()))
    return {key: ids[id(p)] for key, p in layer.bank.named_parameters()}


@BUDGETS
@pytest.mark.parametrize("router", ["cosine", "topk"])
@pytest.mark.parametrize(("name", "init"), GROWTHS)
@pytest.mark.thin(36)
def test_growth_in_the_midst_of_training(name, init, router, budget):
    layer = make(name, router, shared_hidden=2)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    controller = controller_of(layer, init, optimizer, budget=budget)
    size = sum(p.numel() for p in layer.parameters())
    for growth in (1, 2):
        train(layer, optimizer)
        event = controller.grow(growth, (samples(name), None))
        assert layer.num_experts == EXPERTS + growth == event.experts
        x = samples(name, 8)
        torch.testing.assert_close(layer(x), loop(layer, x), rtol=1e-12, atol=1e-12)
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    train(layer, optimizer, 3)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in layer.parameters()]
    for key, axis in entries(layer).items():
        changed = layer.bank.get_parameter(key).detach() != before[f"bank.{key}"]
        changed = changed.movedim(axis, 0).reshape(changed.shape[axis], -1).any(dim=1)
        living = slice(layer.num_experts) if len(changed) == ROOM else slice(None)
        if key == "weights":
            living = slice(layer.bank.live)
        assert router == "topk" or changed[living].all(), key  # old and new: everything learns
    grown = sum(p.numel() for p in layer.parameters())
    if name == "bottleneck" and budget is PER_GROWTH:
        assert grown > size and layer.bank.live == len(layer.bank.weights)
    elif name in WITH_UNITS and budget is PER_GROWTH:
        assert sum(layer.bank.hidden_sizes()) == HIDDEN + 6 and grown > size
    else:
        assert grown == size
    if name in WITH_UNITS:
        assert layer.shared.hidden_sizes() == [2]


@pytest.mark.parametrize("name", IN_PLACE)
@BUDGETS
def test_optimizer_state_follows_and_restarts(name, budget):
    """Entries that keep their weights keep their moments; the others begin again."""
    layer = make(name)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    train(layer, optimizer, 3)
    axes = entries(layer)
    old = {key: layer.bank.get_parameter(key).detach().clone() for key in axes}
    state = {key: copy.deepcopy(optimizer.state[layer.bank.get_parameter(key)]) for key in axes}
    controller_of(layer, "random", optimizer, budget=budget).grow(1, (samples(name), None))
    for key, axis in axes.items():
        parameter = layer.bank.get_parameter(key)
        now = optimizer.state[parameter]
        count = old[key].shape[axis]
        kept = (parameter.detach().narrow(axis, 0, count) == old[key]).movedim(axis, 0)
        kept = kept.reshape(count, -1).all(dim=1)
        assert kept.any() and (not kept.all() or budget is PER_GROWTH), key
        fresh = torch.ones(parameter.shape[axis], dtype=torch.bool)
        fresh[:count] = ~kept
        first, second = (now[k].movedim(axis, 0) for k in ("exp_avg", "exp_avg_sq"))
        was = state[key]["exp_avg"].movedim(axis, 0)
        assert torch.equal(first[:count][kept], was[kept]) and was[kept].any(), key
        assert not first[fresh].any(), key
        assert (second[fresh] > 0).all() and second[fresh].unique().numel() == 1, key


CASES = [(name, "zero-output", PER_GROWTH) for name in BANKS]
CASES += [(name, "duplicate", budget) for name in WITH_UNITS for budget in (CONSTANT, PER_GROWTH)]


@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize(("name", "init", "budget"), CASES)
def test_two_growths_preserve_the_function(name, init, budget, gate_scale):
    layer, x = make(name, gate_scale=gate_scale, shared_hidden=2), samples(name)
    expected = layer(x).detach()
    controller = controller_of(layer, init, budget=budget, pruning="random")
    for growth in (1, 2):
        controller.grow(growth)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.num_experts == EXPERTS + 2


@pytest.mark.parametrize("name", WITHOUT_UNITS)
def test_copies_of_experts_without_units_are_refused(name):
    with pytest.raises(UserError, match="needs a bank with hidden units"):
        controller_of(make(name), "duplicate", pruning="random").grow(1)


@pytest.mark.parametrize("pruning", registry.names("pruning"))
@pytest.mark.parametrize("name", WITH_UNITS)
def test_every_cut_finds_its_scores(name, pruning):
    layer, x = make(name), samples(name)
    controller_of(layer, "random", pruning=pruning).grow(1, (x, None))
    assert layer.bank.hidden_sizes() == [3, 3, 3, 3]


@pytest.mark.parametrize("name", WITH_UNITS)
def test_the_utility_cut_keeps_the_units_that_matter(name):
    """Silent units go first, wherever the pool has them."""
    layer, x = make(name), samples(name)
    silent = torch.stack([(layer.bank.segment == e).nonzero()[1, 0] for e in range(EXPERTS)])
    with torch.no_grad():
        layer.bank.output_weight()[:, silent] = 0.0
    before = layer.bank.output_weight().detach().clone()
    controller_of(layer, "random").grow(1, (x, None))
    changed = (layer.bank.output_weight() != before).transpose(0, 1).flatten(1).any(dim=1)
    assert set(silent.tolist()) == set((layer.bank.segment == EXPERTS).nonzero().flatten().tolist())
    if name != "lora":  # whose fresh units are silent, too
        assert torch.equal(changed.nonzero().flatten(), silent.sort().values)


@pytest.mark.parametrize("name", BANKS)
def test_a_grown_layer_is_restored_into_a_fresh_one(name):
    model, fresh = nn.Sequential(make(name)), nn.Sequential(make(name))
    optimizer = torch.optim.Adam(model.parameters())
    train(model[0], optimizer)
    controller_of(model, "random", optimizer, budget=PER_GROWTH).grow(1, (samples(name), None))
    train(model[0], optimizer)
    other = torch.optim.Adam(fresh.parameters())
    fresh.load_state_dict(model.state_dict(), strict=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else tensors are shared
    x = samples(name)
    assert torch.equal(fresh(x), model(x))
    for net, its in ((model, optimizer), (fresh, other)):
        torch.manual_seed(1)
        train(net[0], its)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("router", ["cosine", "topk"])
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.thin(4)
def test_growth_keeps_one_graph(name, router, device):
    torch._dynamo.reset()
    layer = make(name, router, shared_hidden=2).to(device)
    optimizer = torch.optim.Adam(layer.parameters())
    controller = controller_of(layer, "random", optimizer, pruning="random")
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = samples(name).to(device)
    for growth in range(4):
        if growth:
            controller.grow(growth)
        with torch._dynamo.config.patch(error_on_recompile=growth > 0):
            y = compiled(x)
        gradients: list[tuple[Tensor, ...]] = [
            torch.autograd.grad(z.square().sum(), list(layer.parameters())) for z in (y, layer(x))
        ]
        torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert layer.num_experts == ROOM and counter.frame_count == 1

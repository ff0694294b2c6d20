"""How new experts are treated for a while: the pace of their weights, their router logits."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.new_experts import NewExperts
from dynmoe.moe import MoELayer, moe_layers


def network(layers: int = 1, shared: bool = False, router: str = "softmax") -> nn.Sequential:
    """MoE layers of 2 experts with room for 6; `shared`: one router for all of them."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    made = [MoELayer(5, 5, 12, num_experts=2, max_experts=6, generator=generator,
                     router=registry.get("router", router).Config())]  # fmt: skip
    for _ in range(layers - 1):
        how = made[0].router if shared else registry.get("router", router).Config()
        made.append(MoELayer(5, 5, 12, num_experts=2, max_experts=6, router=how,
                             generator=generator))  # fmt: skip
    return nn.Sequential(*made, nn.Linear(5, 3))


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.Adam(model.parameters(), 0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def grown(
    new_experts: NewExperts | None = None, kind: str = "adam", mode: str = "constant",
    init: str = "random", **make,
) -> tuple[nn.Sequential, torch.optim.Optimizer, GrowthController]:  # fmt: skip
    """Two steps of training, and then a growth from 2 to 4 experts."""
    model = network(**make)
    optimizer = optimizer_of(kind, model)
    controller = GrowthController(
        model, optimizer, granularity=2, budget=Budget(mode=mode), new_experts=new_experts,
        pruning=registry.get("pruning", "first").Config(), init=registry.get("init", init).Config(),
    )  # fmt: skip
    for number in range(2):
        step(model, optimizer, number)
    controller.grow(2)
    return model, optimizer, controller


def is_new(layer: MoELayer, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Mask of a layer's parameter: entries of experts 2 and 3, written out for the pool."""
    mask = torch.zeros_like(parameter, dtype=torch.bool)
    own = name.removeprefix("bank.").removeprefix("router.")
    units = layer.bank.segment >= 2
    if name.startswith("router.") or own == "b_out":
        mask[2:4] = True
    elif own == "w_out":
        mask[:, units] = True
    else:
        mask[units] = True
    return mask


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("mode", ["constant", "per-growth"])
@pytest.mark.parametrize("factor", [0.0, 0.25, 3.0])
def test_new_experts_weights_take_so_many_times_the_step(kind, mode, factor):
    model, optimizer, _ = grown(NewExperts(lr=factor, lr_steps=2), kind, mode)
    for number in range(2, 5):
        plain_model, plain_optimizer = copy.deepcopy((model, optimizer))
        for hooks in (plain_optimizer._optimizer_step_pre_hooks,
                      plain_optimizer._optimizer_step_post_hooks):  # fmt: skip
            hooks.clear()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step(plain_model, plain_optimizer, number)
        step(model, optimizer, number)
        plain = dict(plain_model.named_parameters())
        for name, parameter in model.named_parameters():
            expected = plain[name].detach().clone()
            if name.startswith("0.") and number < 4:
                mask = is_new(model[0], name[2:], parameter)
                moved = plain[name] - before[name]
                expected = torch.where(mask, before[name] + factor * moved, expected)
            torch.testing.assert_close(parameter, expected)
            if name.startswith("0.") and number < 4 and factor == 0:
                assert torch.equal(parameter[mask], before[name][mask])


@pytest.mark.parametrize("init", ["random", "duplicate"])
@pytest.mark.parametrize("logit", [-4.0, 2.0])
def test_new_experts_logits_fade(init, logit):
    """On top of the shift that the init gives, which stays."""
    plain, _, _ = grown(init=init)
    model, optimizer, controller = grown(NewExperts(logit=logit, logit_steps=4), init=init)
    base = plain[0].router.logit_shift
    for left in (1, 0.75, 0.5, 0.25, 0, 0, 0):
        expected = base.clone()
        expected[2:4] += left * logit
        torch.testing.assert_close(model[0].router.logit_shift, expected)
        step(model, optimizer, 7)
    assert torch.equal(model[0].router.logit_shift, base)
    assert controller.warm_up.age == 7


def test_a_negative_logit_gives_new_experts_a_small_share():
    x = torch.randn(50, 5)
    shares = {}
    for logit in (-5.0, 0.0, 5.0):
        model, _, _ = grown(NewExperts(logit=logit))
        model(x)
        shares[logit] = float(model[0].last_routing.gates.detach()[:, 2:4].sum(dim=1).mean())
    assert shares[-5.0] < 0.03 < shares[0.0] < 0.9 < shares[5.0] < 1


def test_the_next_growth_begins_from_shifts_without_the_rest_of_the_last():
    """In the midst of fading; experts that duplicate copies shall not inherit it."""
    pairs = []
    for new_experts in (None, NewExperts(logit=-3.0, logit_steps=100)):
        model, _, controller = grown(new_experts, init="duplicate")
        controller.grow(2)
        pairs.append(model[0].router.logit_shift.clone())
    pairs[1][4:6] += 3.0
    assert torch.equal(*pairs)


@pytest.mark.parametrize("shared", [False, True])
def test_several_layers_and_a_shared_router(shared):
    model, optimizer, _ = grown(
        NewExperts(lr=0.0, logit=-2.0, logit_steps=2), layers=2, shared=shared
    )
    before = [layer.bank.b_out.detach().clone() for _, layer in moe_layers(model)]
    for router in {layer.router for _, layer in moe_layers(model)}:
        assert router.logit_shift.tolist() == [0, 0, -2, -2, 0, 0]
    step(model, optimizer, 3)
    for (_, layer), old in zip(moe_layers(model), before, strict=True):
        assert layer.router.logit_shift.tolist() == [0, 0, -1, -1, 0, 0]
        moved = (layer.bank.b_out != old).any(dim=1)
        assert moved.tolist() == [True, True, False, False, False, False]


def test_the_defaults_change_nothing():
    plain = grown()
    assert not plain[1]._optimizer_step_pre_hooks
    assert len(plain[1]._optimizer_step_post_hooks) == 1  # what moves once per step
    neutral = grown(NewExperts(lr=1.0, lr_steps=3, logit=0.0, logit_steps=5))
    for number in range(3):
        step(*plain[:2], number)
        step(*neutral[:2], number)
    for a, b in zip(plain[0].state_dict().values(), neutral[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop", range(6))
def test_resumed_in_the_midst(stop):
    """Weights, optimizer and controller through a file of plain values; then bit for bit."""
    new_experts = NewExperts(lr=0.3, lr_steps=4, logit=-2.0, logit_steps=3)
    model, optimizer, controller = grown(new_experts)
    for number in range(stop):
        step(model, optimizer, number)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, controller)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other = network()
    other_optimizer = optimizer_of("adam", other)
    other_controller = GrowthController(
        other, other_optimizer, granularity=2, new_experts=new_experts
    )
    for part, state in zip((other, other_optimizer, other_controller), states, strict=True):
        part.load_state_dict(state)
    for number in range(stop, 8):
        step(model, optimizer, number)
        step(other, other_optimizer, number)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert other_controller.warm_up.age == 8


@pytest.mark.parametrize(
    "options",
    [{"lr": -0.1}, {"lr": math.nan}, {"lr": math.inf}, {"logit": math.nan}, {"logit": -math.inf},
     {"lr_steps": 0}, {"logit_steps": 0}],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"new_experts: .*{name}={value}") as caught:
        NewExperts(**options)
    assert "\n" not in str(caught.value)

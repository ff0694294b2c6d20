"""What stands in the network of each agent, and how their sizes compare."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import growth_settings
from torch import nn

from agents.actor_critic import PLACES, ActorCritic
from agents.encoders import MLP
from agents.growth import policy_shock
from agents.methods import Agent
from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.growth import Budget
from dynmoe.growth.settings import GrowthSettings
from dynmoe.moe import moe_layers

NAMES = registry.names("agent")
MOE = ("dynamicmoe", "moe-start", "moe-static")
STEPS, HIDDEN, ACTIONS = 1000, 23, 4
BUDGETS = [Budget(), Budget(mode="per-growth"), Budget(mode="per-growth", units=5)]
TWICE = registry.get("trigger", "at").Config(steps=(300, 600))


def settings(granularity: int = 2, **changes: Any) -> GrowthSettings:
    """Two growths."""
    return growth_settings(granularity, **({"trigger": TWICE} | changes))


def agent(name: str) -> Agent:
    made: Agent = registry.get("agent", name).Config().build()
    return made


def network(
    name: str, growth: GrowthSettings | None = None, seed: int = 0, hidden: int = HIDDEN
) -> ActorCritic:
    make_block = agent(name).make_block(growth or settings(), STEPS, seed)
    config = MLP.Config(hidden=hidden, widths=(6,), place=PLACES)  # type: ignore[arg-type]
    with seeding.seeded(seed, "policy"):
        return ActorCritic(config, (5,), ACTIONS, make_block)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def grown(policy: ActorCritic, growth: GrowthSettings, times: int) -> ActorCritic:
    optimizer = torch.optim.Adam(policy.parameters())
    controller = growth.make_controller(policy, optimizer, seeding.generator(0), policy_shock)
    for count in range(times):
        controller.grow(count, (torch.randn(20, 5), None))
    return policy


@pytest.mark.parametrize("name", NAMES)
def test_every_agent_acts(name: str) -> None:
    policy = network(name)
    logits, values = policy(torch.randn(9, 5))
    assert logits.shape == (9, ACTIONS) and values.shape == (9,)
    (logits.square().sum() + values.square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())
    assert (len(list(moe_layers(policy))) == 3) == (name in MOE)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_seed(name: str) -> None:
    torch.manual_seed(1)
    one = network(name, seed=1).state_dict()
    torch.manual_seed(2)  # must not matter
    again, other = network(name, seed=1).state_dict(), network(name, seed=2).state_dict()
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    weights = [key for key, value in one.items() if value.is_floating_point() and value.any()]
    assert len(weights) > 8 and not any(torch.equal(one[k], other[k]) for k in weights)


@pytest.mark.parametrize("name", NAMES)
def test_all_begin_with_the_same_encoder(name: str) -> None:
    encoders = [network(n).trunk[0].state_dict() for n in (name, "dense")]
    torch.testing.assert_close(*encoders, rtol=0, atol=0)


def test_layers_of_one_network_are_drawn_apart() -> None:
    policy = network("dynamicmoe")
    routers = [layer.router.weight for _, layer in moe_layers(policy)]
    assert not any(torch.equal(routers[i], routers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_who_grows_learns_and_acts() -> None:
    flags = {name: (agent(name).grows, agent(name).learns, agent(name).acts) for name in NAMES}
    assert flags == {
        "dense": (False, True, True),
        "dynamicmoe": (True, True, True),
        "moe-start": (False, True, True),
        "moe-static": (False, True, True),
        "random": (False, False, False),
        "untrained": (False, False, True),
        "wide": (False, True, True),
    }


@pytest.mark.parametrize("name", ["random", "untrained"])
def test_the_idle_are_the_dense_network(name: str) -> None:
    torch.testing.assert_close(
        network(name).state_dict(), network("dense").state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_static_is_as_large_as_the_growing_one_at_its_end(budget: Budget, granularity: int) -> None:
    growth = settings(granularity, budget=budget)
    policy, static = network("dynamicmoe", growth), network("moe-static", growth)
    at_first = size(policy)
    grown(policy, growth, 2)
    assert size(static) == size(policy)
    assert (size(policy) > at_first) == (budget.mode == "per-growth")
    for (name, layer), (other, twin) in zip(moe_layers(policy), moe_layers(static), strict=True):
        assert name == other and layer.num_experts == twin.num_experts == 3 * granularity
        assert layer.max_experts == twin.max_experts == 3 * granularity
        assert sum(layer.bank.hidden_sizes()) == sum(twin.bank.hidden_sizes())


@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_start_is_the_growing_one_before_it_grows(budget: Budget, granularity: int) -> None:
    """Drawn alike, reserved rows included, so that the two can be compared seed by seed."""
    growth = settings(granularity, budget=budget)
    policy, start = network("dynamicmoe", growth), network("moe-start", growth)
    assert policy.state_dict().keys() == start.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name]), name
    assert all(layer.num_experts == granularity for _, layer in moe_layers(start))


@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_wide_has_the_final_hidden_units(budget: Budget, granularity: int) -> None:
    growth = settings(granularity, budget=budget)
    wide, dense = network("wide", growth), network("dense", growth)
    final = grown(network("dynamicmoe", growth), growth, 2)
    units = [sum(layer.bank.hidden_sizes()) for _, layer in moe_layers(final)]
    blocks: list[Any] = [wide.trunk[1], wide.actor[0], wide.critic[0]]
    assert [block[0].out_features for block in blocks] == units
    more = [u - HIDDEN for u in units]
    widths = (6 + 1 + 6, 6 + 1 + ACTIONS, 6 + 1 + 1)
    assert size(wide) - size(dense) == sum(m * w for m, w in zip(more, widths, strict=True))
    assert all(m >= 0 for m in more) and any(more) == (budget.mode == "per-growth")


def test_dense_is_as_large_as_one_expert() -> None:
    """But for the router's rows, and the output biases of the experts to come."""
    growth = settings(1)
    start, dense = network("moe-start", growth), network("dense", growth)
    reserved = start.trunk[1].max_experts - 1
    rows = (6 + reserved * (6 + 6)) + (6 + reserved * (6 + ACTIONS)) + (6 + reserved * (6 + 1))
    assert size(start) - size(dense) == rows


NEVER: dict[str, dict[str, Any]] = {
    "at": {"steps": (STEPS, 5 * STEPS)},
    "every": {"steps": STEPS},
    "plateau": {"patience": STEPS},
    "task": {},
}


@pytest.mark.parametrize("trigger", NEVER)
def test_a_trigger_that_never_fires_is_refused(trigger: str) -> None:
    growth = settings(trigger=registry.get("trigger", trigger).Config(**NEVER[trigger]))
    with pytest.raises(UserError) as caught:
        network("dynamicmoe", growth)
    message = str(caught.value)
    assert f"trigger {trigger} never fires in {STEPS} environment steps" in message
    assert "moe-start" in message and "\n" not in message
    network("moe-start", growth)
    network("dense", growth)


@pytest.mark.parametrize("name", ["dynamicmoe", "moe-static"])
def test_experts_without_units_are_refused(name: str) -> None:
    network(name, settings(1), hidden=3)
    with pytest.raises(UserError, match="constant budget holds 2 hidden units") as caught:
        network(name, settings(1), hidden=2)
    assert "\n" not in str(caught.value) and "--network" not in str(caught.value)
    with pytest.raises(UserError, match="granularity 0 must be at least 1"):
        network(name, settings(0))


@pytest.mark.parametrize(("name", "granularity"), [("moe-start", 0), ("moe-start", 30)])
def test_start_refuses_what_no_layer_can_have(name: str, granularity: int) -> None:
    with pytest.raises(UserError) as caught:
        network(name, settings(granularity))
    assert "experts" in str(caught.value) or "granularity" in str(caught.value)


@pytest.mark.parametrize("granularity", [1, 2, 5])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("hidden", [20, 23])
def test_final_hidden_is_what_growth_leads_to(
    budget: Budget, granularity: int, hidden: int
) -> None:
    growth = settings(granularity, budget=budget)
    layer = growth.make_layer(6, 3, hidden, granularity, 3 * granularity, seeding.generator(0))
    for experts in (1, 2, 3):
        found = growth.final_hidden(hidden, experts * granularity)
        assert found == sum(layer.bank.hidden_sizes())
        if experts < 3:
            growth.make_controller(
                nn.Sequential(layer), torch.optim.SGD(layer.parameters(), 1.0), seeding.generator(0)
            ).grow(0, (torch.randn(8, 6), None))
    first = math.ceil(hidden / granularity)
    per = {"constant": 0, "per-growth": 2 * granularity * (budget.units or first)}[budget.mode]
    assert found == hidden + per

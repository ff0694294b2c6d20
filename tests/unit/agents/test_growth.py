"""Growth inside PPO: signals, and the shock that a growth is to the agent."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from common import SMALL, Silent, make_policy, moe_blocks, rollout_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents.actor_critic import ActorCritic
from agents.growth import policy_shock, sample, signals
from agents.ppo import UpdateStats, train
from agents.rollout import Rollout
from dynmoe import registry, seeding
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import moe_layers

PER_GROWTH = Budget(mode="per-growth")


# ---------------------------------------------------------------- signals


def test_reached_counts_environments_once_however_long_they_stay() -> None:
    floors = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0], [2, 1, 1, 0], [0, 0, 2, 0]])
    seen = signals(640, rollout_of(floors=floors), 4, 3.5)
    assert (seen.step, seen.score, seen.task_starts) == (640, 3.5, False)
    assert seen.reached == (0.75, 0.5, 0.5, 0.0)
    assert math.isnan(signals(1, rollout_of(floors=floors), 4, math.nan).score or 0.0)


def test_figures_are_those_of_the_update_and_of_the_actor() -> None:
    """nan, and not None, where there is no new value: triggers wait then, and do not refuse."""
    rollout = rollout_of(floors=torch.zeros(2, 3, dtype=torch.long))
    stats = UpdateStats(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    measured = {"actor/rank/effective_rank": 8.0, "critic/rank/effective_rank": 9.0,
                "actor/dormant/0.1": 0.25, "actor/dormant/0": 0.5}  # fmt: skip
    seen = signals(1, rollout, 4, 0.0, stats, measured)
    assert (seen.loss, seen.grad_norm, seen.effective_rank, seen.dormant) == (2.0, 6.0, 8.0, 0.25)
    none = signals(1, rollout, 4, 0.0)
    for name in ("loss", "grad_norm", "effective_rank", "dormant"):
        assert math.isnan(getattr(none, name))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40), st.integers(1, 5))
def test_reached_is_that_of_loops(seed: int, steps: int, envs: int, floors: int) -> None:
    g = torch.Generator().manual_seed(seed)
    where = torch.randint(0, floors, (steps, envs), generator=g)
    seen = signals(0, rollout_of(floors=where), floors + 1, 0.0)
    expected = [
        sum(any(int(where[t, n]) == floor for t in range(steps)) for n in range(envs)) / envs
        for floor in range(floors + 1)
    ]
    assert list(seen.reached) == expected  # to the last bit: triggers compare it with a share


def test_one_of_ten_is_no_more_than_a_share_of_a_tenth() -> None:
    trigger = registry.get("trigger", "stage").Config(share=0.1).build()
    floors = torch.zeros(3, 10, dtype=torch.long)
    floors[1, 4] = 1
    assert not trigger.fires(signals(1, rollout_of(floors=floors), 2, 0.0))
    floors[2, 5] = 1
    assert trigger.fires(signals(2, rollout_of(floors=floors), 2, 0.0))


def test_the_floor_that_all_begin_on_is_no_arrival() -> None:
    trigger = registry.get("trigger", "stage").Config(limit=5).build()
    floors = torch.full((3, 4), 2)
    told = [trigger.fires(signals(1, rollout_of(floors=floors), 6, 0.0, first=2))]
    floors[1, 0] = 3
    told += [trigger.fires(signals(n, rollout_of(floors=floors), 6, 0.0, first=2)) for n in (2, 3)]
    assert told == [False, True, False]


def test_phases_are_stages_whatever_their_floors() -> None:
    """They begin on floors 3, 1 and 4, and some agent always gets deeper by itself."""
    trigger = registry.get("trigger", "stage").Config(limit=5).build()
    fired = []
    for step, (phase, floor) in enumerate([(0, 3), (0, 3), (1, 1), (1, 1), (2, 4)]):
        floors = torch.full((3, 4), floor)
        floors[2, 1] = 5
        seen = signals(step, rollout_of(floors=floors), 9, 0.0, first=floor, phases=(phase, 3))
        fired.append(trigger.fires(seen))
    assert fired == [False, False, True, False, True]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 400))
def test_samples_are_spread_over_the_rollout(steps: int, envs: int, count: int) -> None:
    index = sample(rollout_of(floors=torch.zeros(steps, envs, dtype=torch.long)), count).tolist()
    total = steps * envs
    assert len(index) == min(count, total) and index[0] == 0
    assert all(0 <= i < total for i in index)
    gaps = [b - a for a, b in pairwise(index)]
    if gaps:
        assert index[-1] == total - 1
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


# ---------------------------------------------------------------- shock


def outputs(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(size, 5, generator=g), torch.randn(size, generator=g)


def test_shock_is_that_of_torchs_distributions() -> None:
    before, after = outputs(1), outputs(2)
    old, new = (torch.distributions.Categorical(logits=x[0]) for x in (before, after))
    expected = {
        "policy_kl": float(torch.distributions.kl_divergence(old, new).mean()),
        "value_change": math.sqrt(float((before[1] - after[1]).square().mean())),
    }
    assert policy_shock(before, after, None) == pytest.approx(expected, rel=1e-5)
    assert expected["policy_kl"] > 0.5


def test_nothing_changed_is_no_shock() -> None:
    logits, values = outputs(1)
    assert policy_shock((logits, values), (logits, values), None) == {
        "policy_kl": 0.0, "value_change": 0.0,
    }  # fmt: skip
    for seed in range(30):  # the same policy but for rounding, which never makes it negative
        logits, values = outputs(seed)
        moved = policy_shock((logits, values), (logits + 3, values + 3), None)
        assert moved == pytest.approx({"policy_kl": 0.0, "value_change": 3.0}, abs=1e-6)
        assert moved["policy_kl"] >= 0


def test_a_shock_that_is_no_number_is_not_hidden() -> None:
    before, after = outputs(1), outputs(2)
    after[0][3] = math.nan
    assert math.isnan(policy_shock(before, after, None)["policy_kl"])


def grown_shock(init: str, budget: Budget, scale: str) -> tuple[dict[str, float], ActorCritic]:
    """Of a growth of a trained policy, measured on another batch as well."""
    env = stages(4)
    make_block = moe_blocks(gate_scale=scale, budget=budget)
    policy = make_policy(env, make_block=make_block, place=("trunk", "actor", "critic"))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    observations, info = env.reset(seed=0)
    short = replace(SMALL, total_steps=192)
    train(env, policy, optimizer, short, 0, Silent(), observations, info["floor"])
    controller = GrowthController(
        policy, optimizer, granularity=2, budget=budget, measure_shock=policy_shock,
        init=registry.get("init", init).Config(),
        pruning=registry.get("pruning", "reinit").Config(),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(4)).to(torch.uint8)
    with torch.no_grad():
        before = policy(env.unpack(everything))
        shock = controller.grow(1, (env.unpack(everything), None)).shock
        after = policy(env.unpack(everything))
    assert shock == pytest.approx(policy_shock(before, after, None), abs=1e-7)
    return shock, policy


@pytest.mark.parametrize("scale", ["experts", "one"])
@pytest.mark.parametrize(
    ("init", "budget", "keeps"),
    [
        ("zero-output", PER_GROWTH, True),
        ("zero-output", Budget(), False),  # what the budget cuts is a change of its own
        ("duplicate", PER_GROWTH, True),
        ("duplicate", Budget(), True),
        ("random", PER_GROWTH, False),
    ],
    ids=str,
)
def test_shock_is_what_the_init_promises(
    init: str, budget: Budget, keeps: bool, scale: str
) -> None:
    shock, policy = grown_shock(init, budget, scale)
    assert all(layer.num_experts == 4 for _, layer in moe_layers(policy))
    assert shock.keys() == {"policy_kl", "value_change"}
    if keeps:
        assert shock["policy_kl"] < 1e-6 and shock["value_change"] < 1e-5
    else:
        assert shock["policy_kl"] > 1e-5 and shock["value_change"] > 1e-2


class Grower(Silent):
    """Asks a controller after each update, as the command does."""

    def __init__(self, controller: GrowthController, policy: ActorCritic, env: Any) -> None:
        super().__init__()
        self.controller, self.policy, self.env = controller, policy, env

    def update_done(self, update: int, rollout: Rollout, stats: UpdateStats | None) -> None:
        super().update_done(update, rollout, stats)
        seen = signals(update * SMALL.batch_size, rollout, self.env.num_floors, 0.0)
        probe = self.env.unpack(rollout.observations.flatten(0, 1)[sample(rollout, 32)])
        self.controller.step(seen, lambda: (probe, None))


@pytest.mark.parametrize("budget", [PER_GROWTH, Budget()], ids=str)
def test_training_goes_on_through_a_growth(budget: Budget) -> None:
    """New units and router rows learn, and rollouts keep their shape."""
    env = stages(4)
    policy = make_policy(env, make_block=moe_blocks(budget=budget))
    optimizer = torch.optim.Adam(policy.parameters(), SMALL.lr)
    controller = GrowthController(
        policy, optimizer, granularity=2, budget=budget, measure_shock=policy_shock,
        trigger=registry.get("trigger", "at").Config(steps=(500,)),
        generator=seeding.generator(0),
    )  # fmt: skip
    observer = Grower(controller, policy, env)
    observations, info = env.reset(seed=0)
    train(env, policy, optimizer, SMALL, 0, observer, observations, info["floor"])
    (event,) = controller.events
    assert event.step == 512  # the first multiple of 64 from 500 on
    for name, layer in moe_layers(policy):
        gates = [rollout.gates[name] for rollout in observer.rollouts]
        assert all(g.shape == (16, 4, 4) for g in gates)
        assert not any(g[..., 2:].any() for g in gates[:8])
        assert all((g[..., 2:] > 0).all() for g in gates[8:])
        assert layer.bank.hidden_sizes() == event.hidden_sizes[name]
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in policy.parameters()}
    assert all(stats is not None and math.isfinite(stats.grad_norm) for stats in observer.stats)

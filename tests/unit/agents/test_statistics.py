"""Sums over episodes and routing against loops, and through a file."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from common import SMALL as SETTINGS
from common import Counter, make_policy, moe_blocks, rollout_of, run, stages
from torch import Tensor

from agents.rollout import Episode, Rollout
from agents.statistics import RECENT, EpisodeStats, FloorRouting, learning_curve
from dynmoe.moe import moe_layers


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def episode(value: float, length: int = 5, deepest: int = 0, unlocked: tuple = ()) -> Episode:
    return Episode(0, 0, value, length, deepest, list(unlocked))


def with_episodes(*episodes: Episode) -> Rollout:
    return rollout_of(rewards=torch.zeros(1, 1), episodes=list(episodes))


# ---------------------------------------------------------------- episodes


def test_means_over_episodes_by_hand() -> None:
    stats = EpisodeStats(stages())
    assert stats.values() == {} and math.isnan(stats.score)
    stats.add(with_episodes(episode(9.0, 20, 1, (0,)), episode(18.0, 23, 2, (0, 1))))
    stats.add(with_episodes())
    stats.add(with_episodes(episode(0.0, 32)))
    assert stats.values() == pytest.approx({
        "episode/return": 9.0, "episode/return_recent": 9.0, "episode/length": 25.0,
        "episode/count": 3.0, "episode/deepest_floor": 2.0, "episode/mean_deepest_floor": 1.0,
        "episode/return_percent": 50.0,
        "achievement/enter_floor_1": 2 / 3, "achievement/enter_floor_2": 1 / 3,
    })  # fmt: skip


def test_a_stretch_begins_again_but_the_running_mean_goes_on() -> None:
    stats = EpisodeStats(stages())
    stats.add(with_episodes(episode(6.0, 20, 2, (0, 1))))
    stats.restart()
    assert stats.values() == {} and stats.score == 6.0
    stats.add(with_episodes(episode(12.0)))
    values = stats.values()
    assert (values["episode/return"], values["episode/return_recent"]) == (12.0, 9.0)
    assert values["episode/deepest_floor"] == values["achievement/enter_floor_1"] == 0.0


def test_the_running_mean_is_of_the_latest_hundred() -> None:
    stats = EpisodeStats(stages())
    returns = [float(i * i % 97) for i in range(250)]
    for i, value in enumerate(returns):
        stats.add(with_episodes(episode(value)))
        latest = returns[max(0, i + 1 - RECENT) : i + 1]
        assert stats.score == pytest.approx(sum(latest) / len(latest))
    assert RECENT == 100


def test_an_environment_without_achievements_or_a_most() -> None:
    stats = EpisodeStats(Counter(2, [3]))
    stats.add(with_episodes(episode(4.0)))
    assert stats.values().keys() == {
        "episode/return", "episode/return_recent", "episode/length", "episode/count",
        "episode/deepest_floor", "episode/mean_deepest_floor",
    }  # fmt: skip


def test_statistics_of_a_real_run_are_those_of_its_episodes() -> None:
    env = stages()
    observer, _ = run(env, make_policy(env), SETTINGS)
    stats = EpisodeStats(env)
    for rollout in observer.rollouts:
        stats.add(rollout)
    episodes, values = observer.episodes, stats.values()
    assert values["episode/count"] == len(episodes) > 20
    assert values["episode/return"] == pytest.approx(
        sum(e.episode_return for e in episodes) / len(episodes)
    )
    reached = sum(e.deepest >= 1 for e in episodes) / len(episodes)
    assert values["achievement/enter_floor_1"] == pytest.approx(reached)


def test_episode_statistics_go_on_from_a_file() -> None:
    one, other = EpisodeStats(stages()), EpisodeStats(stages())
    for i in range(120):
        one.add(with_episodes(episode(float(i), i, i % 3, (0,) * (i % 2))))
    other.load_state_dict(through_a_file(one.state_dict()))
    assert other.values() == one.values()
    for stats in (one, other):
        stats.add(with_episodes(episode(7.0, 3, 2, (1,))))
    assert other.values() == one.values() and other.score == one.score
    for stats in (one, other):
        stats.restart()
        stats.add(with_episodes(episode(1.0)))
    assert other.values() == one.values()


# ---------------------------------------------------------------- routing by floor


def routed(floors: Tensor, **gates: Tensor) -> Rollout:
    return rollout_of(floors=floors, gates=gates)


def test_loads_by_floor_are_those_of_loops() -> None:
    """Over several rollouts, in a layer with room for two experts more and on sparse gates."""
    g = torch.Generator().manual_seed(0)
    stats, sums, counts = FloorRouting(5), torch.zeros(5, 3), torch.zeros(5)
    for steps in (7, 2, 11):
        floors = torch.randint(0, 4, (steps, 3), generator=g)  # floor 4 is never visited
        gates = torch.rand(steps, 3, 3, generator=g) * (torch.rand(steps, 3, 3, generator=g) > 0.3)
        gates[..., 0] += 0.1
        room = torch.cat([gates, torch.zeros(steps, 3, 2)], dim=2)
        stats.add(routed(floors, one=room, two=room.roll(1, dims=2)))
        for t in range(steps):
            for n in range(3):
                sums[floors[t, n]] += gates[t, n] / gates[t, n].sum()
                counts[floors[t, n]] += 1
    values = stats.values(3)
    for floor in range(4):
        for expert in range(3):
            mean_share = float(sums[floor, expert] / counts[floor])
            assert values[f"router/floor_{floor}/one/expert_{expert}"] == pytest.approx(mean_share)
    assert not any("floor_4" in tag or "expert_3" in tag for tag in values)
    load = sums[:4].double() / counts[:4, None]
    load /= load.sum(dim=1, keepdim=True)
    mean = load.mean(dim=0)
    nats = sum(
        float(p * math.log(p / q)) / 4 for row in load for p, q in zip(row, mean, strict=True)
    )
    assert values["router/floor_information/one"] == pytest.approx(nats, rel=1e-4)
    assert 0 < values["router/floor_information_share/one"] < 1


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_information_is_0_without_and_maximal_with_knowledge_of_the_floor(experts: int) -> None:
    floors = torch.arange(3).repeat(8).view(4, 6)
    blind = torch.rand(experts).softmax(0).expand(4, 6, experts)
    knowing = torch.eye(experts)[floors % experts]
    stats = FloorRouting(3)
    stats.add(routed(floors, blind=blind, knowing=knowing))
    values = stats.values(experts)
    assert values["router/floor_information/blind"] == pytest.approx(0, abs=1e-7)
    assert values["router/floor_information_share/blind"] == pytest.approx(0, abs=1e-6)
    use = torch.bincount(torch.arange(3) % experts).double() / 3
    most = -sum(float(p * p.log()) for p in use)
    assert values["router/floor_information/knowing"] == pytest.approx(most)
    assert values["router/floor_information_share/knowing"] == pytest.approx(1)


def test_floors_weigh_alike_however_long_the_stay() -> None:
    """99 steps on floor 0 with expert 0, one on floor 1 with expert 1."""
    floors = torch.tensor([[0]] * 99 + [[1]])
    stats = FloorRouting(2)
    stats.add(routed(floors, layer=torch.eye(2)[floors]))
    assert stats.values(2)["router/floor_information/layer"] == pytest.approx(math.log(2))


def test_one_floor_tells_nothing_and_a_dense_network_has_no_routing() -> None:
    stats = FloorRouting(3)
    floors = torch.ones(4, 2, dtype=torch.long)
    stats.add(routed(floors, layer=torch.eye(2).repeat(4, 1, 1)))
    values = stats.values(2)
    assert values["router/floor_information/layer"] == 0
    assert values["router/floor_1/layer/expert_0"] == pytest.approx(0.5)
    dense = FloorRouting(3)
    assert dense.values(1) == {}
    dense.add(routed(floors))
    assert dense.values(1) == {}


def test_routing_of_a_real_run() -> None:
    """Its loads over floors, weighted by visits, are the layers' mean gates."""
    env = stages()
    policy = make_policy(env, make_block=moe_blocks())
    observer, _ = run(env, policy, SETTINGS)
    stats = FloorRouting(3)
    for rollout in observer.rollouts:
        stats.add(rollout)
    values = stats.values(2)
    floors = torch.cat([r.floors for r in observer.rollouts]).flatten()
    visits = torch.bincount(floors, minlength=3) / len(floors)
    for name, _ in moe_layers(policy):
        gates = torch.cat([r.gates[name] for r in observer.rollouts]).flatten(0, 1).mean(dim=0)
        load = [
            sum(float(v) * values[f"router/floor_{f}/{name}/expert_{e}"]
                for f, v in enumerate(visits) if v > 0)
            for e in range(2)
        ]  # fmt: skip
        assert load == pytest.approx(gates[:2].tolist(), abs=1e-5)


def test_routing_statistics_go_on_from_a_file() -> None:
    g = torch.Generator().manual_seed(0)
    one, other = FloorRouting(3), FloorRouting(3)
    rollouts = [
        routed(torch.randint(0, 3, (5, 2), generator=g), a=torch.rand(5, 2, 4, generator=g))
        for _ in range(3)
    ]
    one.add(rollouts[0])
    other.load_state_dict(through_a_file(one.state_dict()))
    for stats in (one, other):
        stats.add(rollouts[1])
    assert one.values(4) == other.values(4)
    for stats in (one, other):
        stats.restart()
        assert stats.values(4) == {}
        stats.add(rollouts[2])
    fresh = FloorRouting(3)
    fresh.add(rollouts[2])
    assert one.values(4) == other.values(4) == fresh.values(4)


# ---------------------------------------------------------------- curves


def test_learning_curve_over_seeds() -> None:
    runs = [
        {"curve": [[100, None], [200, 3.0]], "growth": [{"step": 150}]},
        {"curve": [[100, 1.0], [200, 5.0]], "growth": [{"step": 150}, {"step": 120}]},
    ]
    curve = learning_curve(runs)
    assert curve["steps"] == [100, 200] and curve["growths"] == [120, 150]
    assert math.isnan(curve["returns"][0][0])
    assert [curve["returns"][0][1], *curve["returns"][1]] == [3.0, 1.0, 5.0]

"""Rollouts against slow replays of the environment, advantages against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Counter, make_policy, moe_blocks, rollout_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from agents.actor_critic import ActorCritic
from agents.encoders import MLP
from agents.rollout import Rollout, collect, estimate_advantages
from dynmoe.moe import moe_layers
from envs.debug import Stages
from envs.vector import TorchVectorEnv


class Judge(ActorCritic):
    """Finds every action of a Counter equally good, and knows what it says a state is worth."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), 2), x @ torch.tensor([100.0, 1.0, 10.0])


def judge(env: TorchVectorEnv) -> Judge:
    return Judge(MLP.Config(hidden=4, widths=(4,)), env.input_shape, env.num_actions)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def roll(
    env: TorchVectorEnv, policy: ActorCritic, steps: int = 40, seed: int = 0, uniform: bool = False
) -> Rollout:
    observations, info = env.reset(seed=3)
    return collect(env, policy, observations, info["floor"], steps, 0.9, seeded(seed), uniform)


# ---------------------------------------------------------------- advantages


def naive_advantages(rollout: Rollout, gamma: float, lam: float) -> Tensor:
    """sum_k (gamma lambda)^k delta_t+k up to the episode's end, float64, by loops."""
    steps, envs = rollout.rewards.shape
    result = torch.zeros(steps, envs, dtype=torch.double)
    for n in range(envs):
        values = [*rollout.values[:, n].tolist(), float(rollout.last_value[n])]
        for t in range(steps):
            factor = 1.0
            for k in range(t, steps):
                done = bool(rollout.dones[k, n])
                after = 0.0 if done else gamma * values[k + 1]
                result[t, n] += factor * (float(rollout.rewards[k, n]) + after - values[k])
                factor *= gamma * lam
                if done:
                    break
    return result


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
)
def test_advantages_are_the_sum_of_their_definition(
    seed: int, steps: int, envs: int, gamma: float, lam: float, ending: float
) -> None:
    g = seeded(seed)
    rewards, values = torch.randn(2, steps, envs, generator=g).unbind()
    dones = torch.rand(steps, envs, generator=g) < ending
    last = torch.randn(envs, generator=g)
    rollout = rollout_of(rewards=rewards, values=values, dones=dones, last_value=last)
    got = estimate_advantages(rollout, gamma, lam)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), naive_advantages(rollout, gamma, lam), rtol=1e-4, atol=1e-4
    )


def test_nothing_leaks_over_the_end_of_an_episode() -> None:
    rewards, values = torch.randn(2, 8, 2, generator=seeded()).unbind()
    dones = torch.zeros(8, 2, dtype=torch.bool)
    dones[4, 0] = True
    before = estimate_advantages(
        rollout_of(rewards=rewards, values=values, dones=dones), 0.99, 0.95
    )
    rewards[5:] += 1e6
    values[5:] -= 1e6
    last = torch.full((2,), 1e9)
    after = estimate_advantages(
        rollout_of(rewards=rewards, values=values, dones=dones, last_value=last), 0.99, 0.95
    )
    assert torch.equal(before[:5, 0], after[:5, 0])
    assert not torch.isclose(before[:5, 1], after[:5, 1]).any()
    assert not torch.isclose(before[5:], after[5:]).any()


def test_advantages_by_hand() -> None:
    """Rewards 1, 2, 4, 8; both episodes end at the second step, in 0 for good, in 1 cut off.

    V is 100 n + (steps so far) + 10 (steps in this episode), gamma and lambda are a half.
    """
    env = Counter(2, [2, 3])
    observations, info = env.reset()
    rollout = collect(env, judge(env), observations, info["floor"], 4, 0.5, seeded())
    assert rollout.values.T.tolist() == [[0, 11, 2, 13], [100, 111, 102, 113]]
    assert rollout.last_value.tolist() == [24, 124]
    assert rollout.dones.T.tolist() == [[False, True, False, False]] * 2
    # V of environment 1's last observation is 100 + 2 + 20: of the new episode's first, 100 + 2
    assert rollout.rewards.T.tolist() == [[1, 2, 4, 8], [1, 2 + 0.5 * 122, 4, 8]]
    expected = [[4.25, -9, 10.25, 7], [-55.5, -48, -52.25, -43]]
    assert estimate_advantages(rollout, 0.5, 0.5).T.tolist() == expected


def test_what_is_both_over_and_cut_off_is_over() -> None:
    """Gymnasium's time limit says truncated in the step in which a game is lost as well."""
    env = Counter(2, [2, 3], both=True)
    observations, info = env.reset()
    rollout = collect(env, judge(env), observations, info["floor"], 4, 0.5, seeded())
    assert rollout.rewards.T.tolist() == [[1, 2, 4, 8], [1, 2, 4, 8]]
    assert rollout.dones.T.tolist() == [[False, True, False, False]] * 2


# ---------------------------------------------------------------- collect


def test_shapes_and_types() -> None:
    env = stages(3)
    policy = make_policy(env, make_block=moe_blocks(), place=("trunk", "critic"))
    rollout = roll(env, policy, 5)
    shapes = {
        "observations": ((5, 3, 2), torch.uint8), "actions": ((5, 3), torch.long),
        "log_probs": ((5, 3), torch.float32), "values": ((5, 3), torch.float32),
        "rewards": ((5, 3), torch.float32), "dones": ((5, 3), torch.bool),
        "last_value": ((3,), torch.float32), "next_observations": ((3, 2), torch.uint8),
        "floors": ((5, 3), torch.long), "next_floors": ((3,), torch.long),
    }  # fmt: skip
    for name, (shape, dtype) in shapes.items():
        tensor = getattr(rollout, name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
        assert not tensor.requires_grad and tensor.grad_fn is None
    assert {name: tuple(gates.shape) for name, gates in rollout.gates.items()} == {
        "trunk.1": (5, 3, 4), "critic.0": (5, 3, 4),
    }  # fmt: skip
    assert rollout.gates["critic.0"].dtype == torch.float32


def test_what_is_recorded_is_what_the_network_says() -> None:
    env = stages(5)
    policy = make_policy(env, make_block=moe_blocks())
    rollout = roll(env, policy, 40)
    assert rollout.dones.any()
    for t in range(40):
        with torch.no_grad():
            logits, values = policy(env.unpack(rollout.observations[t]))
        torch.testing.assert_close(rollout.values[t], values)
        chosen = logits.log_softmax(dim=1)[range(5), rollout.actions[t]]
        torch.testing.assert_close(rollout.log_probs[t], chosen)
        for name, layer in moe_layers(policy):
            assert layer.last_routing is not None
            torch.testing.assert_close(rollout.gates[name][t], layer.last_routing.gates)
            assert not layer.last_routing.gates[:, 2:].any()
    with torch.no_grad():
        torch.testing.assert_close(
            rollout.last_value, policy(env.unpack(rollout.next_observations))[1]
        )


@pytest.mark.parametrize("uniform", [False, True])
def test_a_part_of_the_environments_plays_as_among_all(uniform: bool) -> None:
    """The same actions are drawn for it, and episodes bear their numbers."""
    how = {"need": 1, "floors": 2, "longest": 5}
    whole = Stages("Stages-v0", 6, 1, **how)
    policy = make_policy(whole, make_block=moe_blocks())
    expected = roll(whole, policy, uniform=uniform)
    assert len({episode.length for episode in expected.episodes}) > 2
    parts = [Stages("Stages-v0", 6, 1, part=(r, 3), **how) for r in range(3)]
    found = [roll(part, policy, uniform=uniform) for part in parts]
    for part, own in zip(parts, found, strict=True):
        for name in ("observations", "actions", "dones", "floors"):
            assert torch.equal(getattr(own, name), getattr(expected, name)[:, part.rows])
        for name in ("log_probs", "values", "rewards"):
            assert torch.allclose(getattr(own, name), getattr(expected, name)[:, part.rows])
        for name, gates in own.gates.items():
            assert torch.allclose(gates, expected.gates[name][:, part.rows])
        assert torch.allclose(own.last_value, expected.last_value[part.rows])
        assert torch.equal(own.next_observations, expected.next_observations[part.rows])
    assert sorted(map(str, expected.episodes)) == sorted(str(e) for f in found for e in f.episodes)


def test_floors_line_up_with_observations() -> None:
    env = stages(6)
    rollout = roll(env, make_policy(env), 200)
    assert set(rollout.floors.unique().tolist()) == {0, 1, 2}
    assert torch.equal(rollout.floors, rollout.observations[..., 0].long())
    assert torch.equal(rollout.next_floors, rollout.next_observations[:, 0].long())


def test_one_rollout_begins_where_the_other_ended() -> None:
    env = stages(4)
    policy = make_policy(env)
    whole = roll(env, policy, 60)
    observations, info = env.reset(seed=3)
    floors, generator, parts = info["floor"], seeded(), []
    for steps in (1, 40, 19):
        parts.append(collect(env, policy, observations, floors, steps, 0.9, generator))
        observations, floors = parts[-1].next_observations, parts[-1].next_floors
    for name in ("observations", "actions", "rewards", "dones", "floors", "values", "log_probs"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name
    assert torch.equal(parts[-1].last_value, whole.last_value)
    starts = (0, 1, 41)
    ends = [e.step + s for s, p in zip(starts, parts, strict=True) for e in p.episodes]
    assert ends == [e.step for e in whole.episodes]


def slow_episodes(rollout: Rollout) -> list[tuple]:
    """(step, env, return, length, deepest, achievements) by the rules of Stages-v0, in loops."""
    found = []
    for n in range(rollout.actions.shape[1]):
        score = progress = length = 0
        for t in range(len(rollout.actions)):
            floor, symbol = rollout.observations[t, n].tolist()
            right = int(rollout.actions[t, n]) == (symbol + floor) % 4
            score, progress, length = score + right, progress + right, length + 1
            assert float(rollout.rewards[t, n]) == right or length == 32
            if progress == 6:
                floor, progress = floor + 1, 0
            if floor == 3 or length == 32:
                deepest = min(floor, 2)
                found.append((t, n, float(score), length, deepest, list(range(deepest))))
                score = progress = length = 0
    return sorted(found)


def test_episodes_are_those_of_a_slow_replay() -> None:
    env = stages(6)
    rollout = roll(env, make_policy(env), 300)
    got = [
        (e.step, e.env, e.episode_return, e.length, e.deepest, e.achievements)
        for e in rollout.episodes
    ]
    assert got == slow_episodes(rollout)
    assert len(got) >= 6 * 9 and {row[4] for row in got} == {0, 1, 2}
    ends = {(t, n) for t, n in rollout.dones.nonzero().tolist()}
    assert ends == {(row[0], row[1]) for row in got}


def test_the_same_dice_make_the_same_rollout() -> None:
    def rolled(seed: int) -> Rollout:
        env = stages(4)
        torch.manual_seed(1000 + seed + len(seen))  # must not matter
        seen.append(seed)
        return roll(env, make_policy(env, make_block=moe_blocks()), 30, seed)

    seen: list[int] = []
    one, again, other = rolled(1), rolled(1), rolled(2)
    torch.testing.assert_close(vars(one), vars(again), rtol=0, atol=0)
    assert not torch.equal(one.actions, other.actions)


def counts(rollout: Rollout) -> list[int]:
    return torch.bincount(rollout.actions.flatten(), minlength=4).tolist()


@pytest.mark.parametrize("uniform", [True, False])
def test_actions_are_drawn_as_they_should_be(uniform: bool) -> None:
    env = stages(8)
    policy = make_policy(env)
    with torch.no_grad():  # the same strong taste everywhere
        last: Any = policy.output_layer("actor")
        last.weight.zero_()
        last.bias.copy_(torch.tensor([2.0, 0.0, 1.0, -1.0]))
    rollout = roll(env, policy, 400, uniform=uniform)
    taste = torch.tensor([2.0, 0.0, 1.0, -1.0]).double().softmax(0)
    expected = torch.full((4,), 0.25).double() if uniform else taste
    assert chisquare(counts(rollout), (3200 * expected).tolist()).pvalue > 0.01
    assert chisquare(counts(rollout), (3200 * (taste if uniform else taste.flip(0)))).pvalue < 1e-9
    torch.testing.assert_close(rollout.log_probs, expected.log().float()[rollout.actions])
    with torch.no_grad():
        values = policy(env.unpack(rollout.observations.flatten(0, 1)))[1]
    torch.testing.assert_close(rollout.values.flatten(), values)

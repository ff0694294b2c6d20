"""Episodes cut out of rollouts, against a timeline that is kept whole."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from common import SMALL as SETTINGS
from common import make_policy, moe_blocks, rollout_of, run, stages
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.rollout import Episode, Rollout
from agents.statistics import Trace, Traces
from dynmoe.moe import moe_layers

ENVS = 3


class Timeline:
    """Rollouts whose floors, gates and observations all say which step and environment they are."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.now, self.began = 0, [0] * ENVS
        self.ended: list[tuple[int, Episode]] = []

    def rollout(self, steps: int, ending: float = 0.15) -> Rollout:
        stamp = torch.arange(self.now, self.now + steps)[:, None] * ENVS + torch.arange(ENVS)
        episodes = []
        for t in range(steps):
            for n in range(ENVS):
                if torch.rand((), generator=self.generator) < ending:
                    length = self.now + t + 1 - self.began[n]
                    deepest = int(torch.randint(0, 3, (), generator=self.generator))
                    episodes.append(Episode(n, t, float(length), length, deepest, []))
                    self.ended.append((self.now + t, episodes[-1]))
                    self.began[n] = self.now + t + 1
        self.now += steps
        gates = stamp[..., None] / 1024 + torch.tensor([0.0, 0.5])  # exact in float16
        return rollout_of(
            floors=stamp, gates={"a": gates, "b": gates.flip(2)}, episodes=episodes,
            observations=torch.stack([stamp, -stamp], dim=2),
        )  # fmt: skip


def best_of(ended: list[tuple[int, Episode]], keep: int) -> tuple[int, Episode] | None:
    """(last step, episode): the deepest, of those the longest, of those the first."""
    fitting = [row for row in ended if row[1].length <= keep]
    return max(fitting, key=lambda row: (row[1].deepest, row[1].length), default=None)


def check(trace: Trace | None, wanted: tuple[int, Episode] | None, observations: bool) -> None:
    if wanted is None:
        assert trace is None
        return
    end, episode = wanted
    steps = torch.arange(end + 1 - episode.length, end + 1) * ENVS + episode.env
    assert trace is not None
    assert (trace.episode_return, trace.deepest) == (episode.episode_return, episode.deepest)
    assert torch.equal(trace.floors, steps)
    gates = steps[:, None] / 1024 + torch.tensor([0.0, 0.5])
    assert torch.equal(trace.gates["a"], gates) and torch.equal(trace.gates["b"], gates.flip(1))
    assert trace.gates["a"].dtype == torch.float32
    if observations:
        assert trace.observations is not None
        assert torch.equal(trace.observations, torch.stack([steps, -steps], dim=1))
    else:
        assert trace.observations is None


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 30),
    st.booleans(),
)
def test_the_best_episode_is_cut_out_exactly(
    seed: int, lengths: list[int], keep: int, observations: bool
) -> None:
    line, traces = Timeline(seed), Traces(keep, observations)
    for steps in lengths:
        traces.add(line.rollout(steps))
        check(traces.best, best_of(line.ended, keep), observations)
        kept = sum(len(chunk["floors"]) for chunk in traces.chunks)
        assert kept <= keep + 2 * max(lengths)


def test_an_episode_over_four_rollouts() -> None:
    line, traces = Timeline(0), Traces(keep=100)
    for _ in range(3):
        traces.add(line.rollout(8, ending=0))
        assert traces.best is None
    traces.add(line.rollout(5, ending=1))
    assert traces.best is not None and len(traces.best.floors) in (1, 25)
    check(traces.best, best_of(line.ended, 100), False)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_too_long_episodes_are_passed_over(length: int) -> None:
    line, traces = Timeline(0), Traces(keep=16)
    traces.add(line.rollout(length - 1, ending=0))
    traces.add(line.rollout(1, ending=1))
    assert (traces.best is None) == (length > 16)
    traces.add(line.rollout(1, ending=1))  # of a single step: fits always
    assert traces.best is not None
    assert len(traces.best.floors) in ((1,) if length > 16 else (1, length))


def test_an_episode_begun_before_the_first_rollout_is_passed_over() -> None:
    """As after resuming a run that kept no traces."""
    line, traces = Timeline(0), Traces()
    line.rollout(6, ending=0)
    traces.add(line.rollout(4, ending=0))
    rollout = line.rollout(1, ending=1)
    assert {e.length for e in rollout.episodes} == {11}
    traces.add(rollout)
    assert traces.best is None


def test_deeper_beats_longer_and_longer_beats_shorter() -> None:
    def add(deepest: int, length: int) -> tuple[int, int]:
        episode = Episode(0, length - 1, 0.0, length, deepest, [])
        floors = torch.zeros(length, ENVS, dtype=torch.long)
        traces.add(rollout_of(floors=floors, episodes=[episode]))
        assert traces.best is not None
        return traces.best.deepest, len(traces.best.floors)

    traces = Traces()
    assert add(0, 9) == (0, 9)
    assert add(1, 3) == (1, 3)
    assert add(0, 20) == (1, 3)
    assert add(1, 2) == (1, 3)
    assert add(1, 4) == (1, 4)
    traces.forget()
    assert traces.best is None
    assert add(0, 1) == (0, 1)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("observations", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_traces_go_on_from_a_file(seed: int, observations: bool) -> None:
    """Before there is a best episode, and with one."""
    line, one = Timeline(seed), Traces(20, observations)
    for _ in range(8):
        other = Traces(20, observations)
        other.load_state_dict(through_a_file(one.state_dict()))
        rollout = line.rollout(6, ending=0.05)
        for traces in (one, other):
            traces.add(rollout)
        torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
        check(other.best, best_of(line.ended, 20), observations)


def test_traces_of_a_real_run() -> None:
    """Floors and gates are those of the recorded observations."""
    env = stages()
    policy = make_policy(env, make_block=moe_blocks())
    observer, _ = run(env, policy, SETTINGS, learns=False)
    traces = Traces(observations=True)
    for rollout in observer.rollouts:
        traces.add(rollout)
    trace = traces.best
    assert trace is not None and trace.observations is not None
    deepest = max(e.deepest for e in observer.episodes)
    longest = max(e.length for e in observer.episodes if e.deepest == deepest)
    assert (trace.deepest, len(trace.floors)) == (deepest, longest)
    assert longest > SETTINGS.rollout_steps  # it spans several rollouts
    assert torch.equal(trace.floors, trace.observations[:, 0].long())
    assert trace.floors[0] == 0 and trace.floors.max() == deepest
    policy(env.unpack(trace.observations))
    for name, layer in moe_layers(policy):
        assert layer.last_routing is not None
        torch.testing.assert_close(
            trace.gates[name], layer.last_routing.gates.detach(), rtol=0, atol=1e-3
        )


def test_a_dense_network_has_floors_alone() -> None:
    env = stages()
    observer, _ = run(env, make_policy(env), SETTINGS, learns=False)
    traces = Traces()
    for rollout in observer.rollouts:
        traces.add(rollout)
    assert traces.best is not None and traces.best.gates == {} and len(traces.best.floors) > 5

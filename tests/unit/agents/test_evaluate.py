"""Playing with an agent: whose episodes count, what they say, and the trace of the best."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import evaluate
from agents.actor_critic import ActorCritic
from agents.evaluate import evaluation_summary, play, print_evaluation
from agents.rollout import Episode, collect
from dynmoe import registry, seeding
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.statistics import confidence_interval
from dynmoe.moe import moe_layers
from envs.debug import Stages
from envs.gym import GymEnv
from envs.vector import TorchVectorEnv


def stages(num_envs: int = 12) -> Any:
    """Environments that `play` is to reset: they are somewhere else when it comes."""
    env = Stages("Stages-v0", num_envs, seed=77)
    for _ in range(5):
        env.step(torch.zeros(num_envs, dtype=torch.long))
    return env


def long_rollout(policy: ActorCritic, seed: int, steps: int = 130) -> list[Episode]:
    """All episodes that begin as those of `play` do, in one rollout."""
    env = Stages("Stages-v0", 12)
    observations, info = env.reset(seed=seeding.derive(seed, "evaluate"))
    generator = seeding.generator(seed, "evaluate", "actions")
    return collect(env, policy, observations, info["floor"], steps, 0.5, generator).episodes


def test_each_environments_first_episode_and_no_other(skilled: ActorCritic) -> None:
    episodes, unfinished, _ = play(stages(), skilled, seed=1)
    everything = long_rollout(skilled, seed=1)
    first = [next(e for e in everything if e.env == i) for i in range(12)]
    assert episodes == first and unfinished == 0
    assert len({e.length for e in episodes}) > 3
    assert len([e for e in everything if e.step < 64]) > 12  # others end in the first chunk, too
    assert all(e.step == e.length - 1 for e in episodes)


def test_the_same_seed_plays_the_same_however_it_is_chunked(
    skilled: ActorCritic, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes, _, trace = play(stages(), skilled, seed=1, observations=True)
    assert play(stages(), skilled, seed=2)[0] != episodes
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    again, _, same = play(stages(), skilled, seed=1, observations=True)
    assert again == episodes and trace is not None and same is not None
    for name in ("floors", "observations"):
        assert torch.equal(getattr(trace, name), getattr(same, name))
    assert all(torch.equal(trace.gates[name], same.gates[name]) for name in trace.gates)
    assert play(stages(), skilled, seed=1)[2].observations is None  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [5, 64])
def test_what_is_not_over_in_time_is_left_out_and_counted(
    skilled: ActorCritic, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    whole, _, _ = play(stages(), skilled, seed=1)
    limit = sorted(e.length for e in whole)[3]
    episodes, unfinished, trace = play(stages(), skilled, seed=1, max_steps=limit)
    assert episodes == [e for e in whole if e.length <= limit]
    assert 4 <= len(episodes) < 12 and unfinished == 12 - len(episodes)
    assert trace is not None and len(trace.floors) == max(e.length for e in episodes)
    assert play(stages(), skilled, seed=1, max_steps=10) == ([], 12, None)


def test_the_trace_is_the_best_episode_step_by_step(
    corridor: TorchVectorEnv, stroller: ActorCritic
) -> None:
    episodes, _, trace = play(corridor, stroller, seed=0, observations=True)
    best = max(episodes, key=lambda e: (e.deepest, e.length))
    assert any(e.length > best.length for e in episodes)  # longer, but not as deep
    assert any(e.length < best.length for e in episodes if e.deepest == best.deepest)
    assert trace is not None and trace.observations is not None
    assert (trace.episode_return, trace.deepest) == (best.episode_return, best.deepest)
    assert len(trace.floors) == best.length == len(trace.observations)
    assert trace.floors.tolist() == (trace.observations[:, 0] // 2).tolist()
    assert trace.floors.unique().tolist() == [0, 1]
    with torch.no_grad():
        stroller(corridor.unpack(trace.observations))
    layers = dict(moe_layers(stroller))
    assert list(trace.gates) == list(layers) == ["actor.0", "critic.0"]
    for name, layer in layers.items():
        assert layer.last_routing is not None
        torch.testing.assert_close(trace.gates[name], layer.last_routing.gates)
        assert trace.gates[name].shape == (best.length, 4) and not trace.gates[name][:, 2:].any()


def test_the_policy_is_followed_or_not_and_left_as_it_was(skilled: ActorCritic) -> None:
    def mean(**how: Any) -> float:
        episodes, _, _ = play(stages(64), skilled, seed=0, **how)
        return sum(e.episode_return for e in episodes) / len(episodes)

    before = {name: tensor.clone() for name, tensor in skilled.state_dict().items()}
    skilled.train()
    routings = [layer.last_routing for _, layer in moe_layers(skilled)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    # 32 steps that are right with probability 1/4 give 8; fewer if an episode ends earlier
    assert mean() > 15 and 7 < mean(uniform=True) < 9
    assert torch.equal(torch.rand(3), expected) and skilled.training
    for (_, layer), routing in zip(moe_layers(skilled), routings, strict=True):
        assert layer.last_routing is routing
    assert all(torch.equal(before[name], t) for name, t in skilled.state_dict().items())


def test_autocast(skilled: ActorCritic) -> None:
    seen: list[torch.dtype] = []

    def hook(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.dtype)

    handle = skilled.actor.register_forward_hook(hook)
    try:
        for mode, dtype in (("none", torch.float32), ("bf16", torch.bfloat16)):
            seen.clear()
            play(stages(2), skilled, seed=0, autocast=mode)
            assert set(seen) == {dtype}
    finally:
        handle.remove()


def test_a_dense_network_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    env = stages(3)
    encoder = registry.get("encoder", "mlp").Config(hidden=8)
    policy = ActorCritic(encoder, env.input_shape, env.num_actions)
    with ProgressLine("playing", 1000) as progress:
        episodes, _, trace = play(env, policy, 0, max_steps=1000, progress=progress)
    assert len(episodes) == 3 and trace is not None and trace.gates == {}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("playing: 64/1000 steps, ")
    assert lines[0].endswith(" episodes=3/3")


EPISODES = [
    Episode(0, 9, 3.0, 10, 1, [0]),
    Episode(1, 31, 8.0, 32, 2, [0, 1]),
    Episode(3, 17, 18.0, 18, 2, [0, 1]),
    Episode(4, 20, 1.0, 21, 0, []),
    Episode(5, 11, 2.0, 12, 1, [0]),
]


def test_summary() -> None:
    summary = evaluation_summary(stages(6), EPISODES, unfinished=1)
    json.dumps(summary, allow_nan=False)
    interval = confidence_interval([3.0, 8.0, 18.0, 1.0, 2.0], "mean")
    assert -5 < interval.low < 6.4 < interval.high < 18
    assert summary == {
        "episodes": 5,
        "unfinished": 1,
        "return_mean": pytest.approx(6.4),
        "return_low": interval.low,
        "return_high": interval.high,
        "return_iqm": pytest.approx(13 / 3),  # without 1 and 18
        "percent_of_max": pytest.approx(100 * 6.4 / 18),
        "length_mean": pytest.approx(93 / 5),
        "deepest_max": 2,
        "deepest_mean": pytest.approx(1.2),
        "achievements": {"enter_floor_1": 0.8, "enter_floor_2": 0.4},
    }


def test_summary_of_what_is_not_known() -> None:
    none = evaluation_summary(stages(6), [], unfinished=6)
    json.dumps(none, allow_nan=False)
    assert (none.pop("episodes"), none.pop("unfinished")) == (0, 6)
    assert none.pop("achievements") == {"enter_floor_1": None, "enter_floor_2": None}
    assert set(none.values()) == {None}
    one = evaluation_summary(stages(6), EPISODES[:1], unfinished=5)
    assert (one["return_mean"], one["return_low"], one["return_high"]) == (3.0, None, None)
    cart = evaluation_summary(GymEnv("CartPole-v1", 1), EPISODES[3:4], unfinished=0)
    assert cart["percent_of_max"] is None and cart["achievements"] == {}
    assert cart["return_mean"] == 1.0


def _rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()
            if line.startswith("│")]  # fmt: skip


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    summary = evaluation_summary(stages(6), EPISODES, unfinished=1)
    summary["achievements"] = {"a": 0.2, "b": 0.0, "c": 1.0, "d": 0.0, "e": 0.4}
    summary |= {"return_low": 2.0, "return_high": 12.345}
    print_evaluation(summary, "dynamicmoe on Stages-v0")
    out = capsys.readouterr().out
    assert "dynamicmoe on Stages-v0" in out
    assert _rows(out) == [
        ["episodes", "5 (1 unfinished left out)"],
        ["mean return [95 % interval]", "6.40 [2.00, 12.35]"],
        ["interquartile mean", "4.33"],
        ["share of the most possible return", "35.6 %"],
        ["mean length", "18.6 steps"],
        ["deepest floor", "2 (mean 1.20)"],
        ["c", "100.0 %"],
        ["e", "40.0 %"],
        ["a", "20.0 %"],
        ["2 other achievements", "never"],
    ]
    print_evaluation(evaluation_summary(stages(6), [], 6), "none")
    assert _rows(capsys.readouterr().out) == [["episodes", "0 (6 unfinished left out)"]]
    summary = evaluation_summary(GymEnv("CartPole-v1", 1), EPISODES[3:4], unfinished=0)
    print_evaluation(summary, "one")
    assert _rows(capsys.readouterr().out) == [
        ["episodes", "1"],
        ["mean return", "1.00"],
        ["interquartile mean", "1.00"],
        ["mean length", "21.0 steps"],
        ["deepest floor", "0 (mean 0.00)"],
    ]

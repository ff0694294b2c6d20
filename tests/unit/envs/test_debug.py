"""The debug environments against their rules, played out one environment at a time."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from envs.debug import GAMES, LONGEST_EPISODE, SYMBOLS, TO_NEXT_FLOOR, Stages
from envs.vector import TorchVectorEnv

NAMES = sorted(GAMES)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def right_actions(observations: Tensor) -> Tensor:
    """(symbol + floor) mod 4."""
    return observations.long().sum(dim=1) % 4


def play(env: TorchVectorEnv, steps: int, skill: float, seed: int = 0) -> list[tuple]:
    """(observations, actions, what step returned), right with a chance of `skill`."""
    g = torch.Generator().manual_seed(0)  # players are the same whatever the environment's seed
    observations, _ = env.reset(seed=seed)
    history = []
    for _ in range(steps):
        drawn = torch.randint(4, (env.num_envs,), generator=g)
        knows = torch.rand(env.num_envs, generator=g) < skill
        actions = torch.where(knows, right_actions(observations), drawn)
        returned = env.step(actions)
        history.append((observations, actions, returned))
        observations = returned[0]
    return history


class Rules:
    """One environment's counters, by the rules as the docstring of Stages has them."""

    def __init__(self, floors: int) -> None:
        self.floors = floors
        self.floor = self.right = self.length = 0
        self.score = 0.0

    def step(self, symbol: int, action: int) -> dict[str, Any]:
        reward = float(action == (symbol + self.floor) % 4)
        self.score += reward
        self.length += 1
        self.right += int(reward)
        terminated = False
        if self.right == 6 and self.floors > 1:
            self.right = 0
            terminated = self.floor == self.floors - 1
            self.floor += not terminated
        truncated = self.length == 32 and not terminated
        seen = {"reward": reward, "terminated": terminated, "truncated": truncated,
                "r": self.score, "l": self.length, "deepest": self.floor}  # fmt: skip
        if terminated or truncated:
            self.__init__(self.floors)  # type: ignore[misc]
        return seen | {"floor": self.floor}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(NAMES), st.integers(1, 4),
       st.sampled_from([0.0, 0.5, 0.9, 1.0]))  # fmt: skip
def test_everything_is_by_the_rules(seed: int, name: str, num_envs: int, skill: float) -> None:
    env = Stages(name, num_envs, seed)
    floors = {"Identity-v0": 1, "Stages-v0": 3}[name]
    games = [Rules(floors) for _ in range(num_envs)]
    for observations, actions, returned in play(env, 80, skill, seed):
        following, reward, terminated, truncated, info = returned
        done = terminated | truncated
        assert torch.equal(info["_final_obs"], done) and torch.equal(info["_episode"], done)
        for n, game in enumerate(games):
            assert observations[n, 0] == game.floor
            deepest_before = game.floor
            expected = game.step(int(observations[n, 1]), int(actions[n]))
            got = {"reward": reward[n], "terminated": terminated[n], "truncated": truncated[n],
                   "floor": info["floor"][n]}  # fmt: skip
            got |= {name: info["episode"][name][n] for name in ("r", "l", "deepest")}
            assert {key: value.item() for key, value in got.items()} == expected
            unlocked = [expected["deepest"] >= floor for floor in range(1, floors)]
            assert info["achievements"][n].tolist() == unlocked
            assert following[n, 0] == game.floor
            assert info["final_obs"][n, 0] == expected["deepest"] >= deepest_before
            if not done[n]:
                assert torch.equal(info["final_obs"][n], following[n])


def test_the_best_play_earns_the_most_possible() -> None:
    for name, length in (("Identity-v0", 32), ("Stages-v0", 18)):
        env = Stages(name, 3)
        ended = [r[4]["episode"] for _, _, r in play(env, 100, 1.0) if r[4]["_episode"].any()]
        assert len(ended) == 100 // length
        for episode in ended:
            assert episode["r"].tolist() == [env.max_return] * 3
            assert episode["l"].tolist() == [length] * 3
            assert episode["deepest"].tolist() == [env.num_floors - 1] * 3
    assert (SYMBOLS, TO_NEXT_FLOOR, LONGEST_EPISODE) == (4, 6, 32)
    assert set(NAMES) == set(GAMES) == {"Identity-v0", "Stages-v0"}


@pytest.mark.parametrize("name", NAMES)
def test_symbols_are_drawn_evenly_and_apart(name: str) -> None:
    history = play(Stages(name, 8), 500, 0.3)
    symbols = torch.stack([observations[:, 1] for observations, _, _ in history])
    shares = torch.bincount(symbols.flatten().long(), minlength=4) / symbols.numel()
    assert ((shares - 0.25).abs() < 0.03).all()
    for n in range(1, 8):
        assert 0.15 < (symbols[:, 0] == symbols[:, n]).float().mean() < 0.35
    assert 0.15 < (symbols[1:] == symbols[:-1]).float().mean() < 0.35


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_envs", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_types_and_spaces(name: str, num_envs: int, device: str) -> None:
    env = Stages(name, num_envs, 0, device)
    floors = env.num_floors
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.num_envs == num_envs and env.num_actions == 4 and env.resumable
    assert env.input_shape == (floors + 4,) and len(env.achievements) == floors - 1
    observations, info = env.reset()
    assert info.keys() == {"floor"} and info["floor"].tolist() == [0] * num_envs
    actions = torch.zeros(num_envs, dtype=torch.long)  # may be anywhere
    following, reward, terminated, truncated, info = env.step(actions)
    for seen in (observations, following, info["final_obs"]):
        assert (tuple(seen.shape), seen.dtype) == ((num_envs, 2), torch.uint8)
        assert env.observation_space.contains(seen.cpu().numpy())
        assert env.single_observation_space.contains(seen[0].cpu().numpy())
    assert env.action_space.contains(actions.numpy())
    types = {
        torch.float32: (reward, info["episode"]["r"]),
        torch.bool: (terminated, truncated, info["_final_obs"], info["_episode"]),
        torch.int64: (info["floor"], info["episode"]["l"], info["episode"]["deepest"]),
    }
    for dtype, tensors in types.items():
        for tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (num_envs,))
            assert tensor.device.type == device
    achievements = info["achievements"]
    assert (tuple(achievements.shape), achievements.dtype) == ((num_envs, floors - 1), torch.bool)
    unpacked = env.unpack(following)
    assert (tuple(unpacked.shape), unpacked.dtype) == ((num_envs, floors + 4), torch.float32)
    env.close()


def test_unpacking_is_one_hot() -> None:
    env = Stages("Stages-v0", 1)
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(4)).to(torch.uint8)
    unpacked = env.unpack(everything)
    assert len(unpacked.unique(dim=0)) == 12 and unpacked.sum(dim=1).tolist() == [2.0] * 12
    assert torch.equal(unpacked[:, :3].argmax(dim=1), everything[:, 0].long())
    assert torch.equal(unpacked[:, 3:].argmax(dim=1), everything[:, 1].long())


def same(one: Any, other: Any) -> bool:
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_everything(name: str) -> None:
    torch.manual_seed(5)
    one = play(Stages(name, 4), 100, 0.7, seed=1)
    torch.manual_seed(6)  # must not matter
    env = Stages(name, 4)
    assert same(one, play(env, 100, 0.7, seed=1))
    assert same(one, play(env, 100, 0.7, seed=1))  # reset starts again
    assert not same(one, play(env, 100, 0.7, seed=2))
    symbols = {tuple(play(env, 1, 0.0, seed)[0][0][:, 1].tolist()) for seed in range(20)}
    assert len(symbols) > 10
    own = Stages(name, 4, seed=1)
    first, _ = own.reset()
    assert torch.equal(first, one[0][0])


def test_what_was_returned_does_not_change_later() -> None:
    env = Stages("Stages-v0", 3)
    kept = play(env, 1, 1.0)[0]
    copy = [x.clone() for x in (kept[0], *kept[2][:4])]
    copy += [v.clone() for v in kept[2][4]["episode"].values()] + [kept[2][4]["floor"].clone()]
    for _ in range(60):
        env.step(torch.zeros(3, dtype=torch.long))
    now = [kept[0], *kept[2][:4], *kept[2][4]["episode"].values(), kept[2][4]["floor"]]
    assert same(copy, now)


@pytest.mark.parametrize("at", [1, 13, 40])
@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(name: str, at: int) -> None:
    """Through a file, in midst of episodes, into an environment of another seed."""
    env = Stages(name, 5, seed=3)
    observations = play(env, at, 0.8, seed=3)[-1][2][0]
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    other = Stages(name, 5, seed=99)
    restored = other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored, observations)
    for step in range(100):
        actions = right_actions(observations) if step % 5 else torch.full((5,), step % 4)
        one, again = env.step(actions), other.step(actions)
        assert same([one], [again])
        observations = one[0]


def test_a_saved_state_is_a_copy() -> None:
    env = Stages("Stages-v0", 2)
    state = env.state_dict()
    env.step(torch.zeros(2, dtype=torch.long))
    assert state["length"].tolist() == [0, 0]
    env.load_state_dict(state)
    env.step(torch.zeros(2, dtype=torch.long))
    assert state["length"].tolist() == [0, 0]

"""Environments of gymnasium's registry against a plain loop over gymnasium itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from dynmoe import seeding
from dynmoe.errors import UserError
from envs.gym import GymEnv


class Picture(gymnasium.Env):
    """Images of 5 x 7 pixels that tell the step; five steps. The last of 3 actions ends it at once.

    Actions are `first` and the two after it: a discrete space need not begin at 0.
    """

    observation_space = spaces.Box(0, 255, (5, 7, 3), np.uint8)

    def __init__(self, first: int = 0) -> None:
        self.first, self.action_space = first, spaces.Discrete(3, start=np.int64(first))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.integers(100, size=(5, 7, 3), dtype=np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps += 1
        image = np.full((5, 7, 3), 100 + self.steps, np.uint8)
        stops = action == self.first + 2
        return image, 0.5, bool(stops), self.steps == 5, {}


class Odd(gymnasium.Env):
    """Shows and takes what it is told."""

    def __init__(self, shows: spaces.Space, takes: spaces.Space) -> None:
        self.observation_space, self.action_space = shows, takes


VECTOR, TWO = spaces.Box(0, 1, (2,)), spaces.Discrete(2)


def stacked(frames: int) -> gymnasium.Env:
    """Its latest frames, which a deque holds."""
    return gymnasium.wrappers.FrameStackObservation(gymnasium.make("CartPole-v1"), frames)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Ids of the environments above."""
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "Picture-v0": (Picture, {}),
        "Engine-v0": (Engine, {}),
        "Stack-v0": (stacked, {"frames": 3}),
        "Shifted-v0": (Picture, {"first": 2}),
        "Words-v0": (Odd, {"shows": VECTOR, "takes": spaces.Text(3)}),
        "Pairs-v0": (Odd, {"shows": VECTOR, "takes": spaces.Tuple((TWO, TWO))}),
        "Lists-v0": (Odd, {"shows": spaces.Sequence(VECTOR), "takes": TWO}),
        "Web-v0": (Odd, {"shows": spaces.Graph(VECTOR, None), "takes": TWO}),
    }
    for name, (entry, options) in made.items():
        gymnasium.register(name, entry, kwargs=options)
    yield
    for name in made:
        del gymnasium.registry[name]


def actions_for(env: GymEnv, steps: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(env.num_actions, (steps, env.num_envs), generator=g)


# ---------------------------------------------------------------- a plain loop


def test_cartpole_is_that_of_a_plain_loop() -> None:
    """Observations, rewards, ends and episodes, with every reset that gymnasium would make."""
    env, steps = GymEnv("CartPole-v1", 3, seed=4), 150
    actions = actions_for(env, steps)
    observations, info = env.reset()
    assert info["floor"].tolist() == [0, 0, 0]
    first = seeding.derive(4, "CartPole-v1", 0) % 2**31
    games = [gymnasium.make("CartPole-v1") for _ in range(3)]
    seen = [game.reset(seed=first + n)[0] for n, game in enumerate(games)]
    scores, lengths, ended = [0.0] * 3, [0] * 3, 0
    np.testing.assert_array_equal(observations.numpy(), np.stack(seen))
    for t in range(steps):
        observations, reward, terminated, truncated, info = env.step(actions[t])
        for n, game in enumerate(games):
            final, gained, over, cut_off, _ = game.step(int(actions[t, n]))
            scores[n] += float(gained)
            lengths[n] += 1
            assert float(reward[n]) == gained
            assert (bool(terminated[n]), bool(truncated[n])) == (over, cut_off)
            assert bool(info["_episode"][n]) == bool(info["_final_obs"][n]) == (over or cut_off)
            np.testing.assert_array_equal(info["final_obs"][n].numpy(), final)
            assert float(info["episode"]["r"][n]) == scores[n]
            assert int(info["episode"]["l"][n]) == lengths[n]
            if over or cut_off:
                final, scores[n], lengths[n] = game.reset()[0], 0.0, 0
                ended += 1
            np.testing.assert_array_equal(observations[n].numpy(), final)
    assert ended > 10
    env.close()


def test_the_time_limit_truncates() -> None:
    """Kept up by a rule of thumb, the pole stands until step 500."""
    env = GymEnv("CartPole-v1", 2)
    observations, _ = env.reset()
    for _t in range(500):
        ahead = observations[:, 2] + 0.3 * observations[:, 3] + 0.02 * observations[:, 0]
        ahead += 0.05 * observations[:, 1]
        observations, _, terminated, truncated, info = env.step((ahead > 0).long())
        if terminated.any() or truncated.any():
            break
    assert truncated.tolist() == [True, True] and not terminated.any()
    assert info["episode"]["l"].tolist() == [500, 500]
    assert info["episode"]["r"].tolist() == [500.0, 500.0]
    assert not torch.equal(info["final_obs"], observations)
    env.close()


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("name", ["CartPole-v1", "Picture-v0"])
def test_shapes_types_and_spaces(name: str, device: str) -> None:
    env = GymEnv(name, 2, 0, device)
    assert isinstance(env, GymEnv) and env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert (env.num_envs, env.num_floors, env.achievements, env.max_return) == (2, 1, (), None)
    assert env.resumable
    kinds: dict[str, Any] = {
        "CartPole-v1": ((4,), torch.float32, 2), "Picture-v0": ((5, 7, 3), torch.uint8, 3),
    }  # fmt: skip
    shape, dtype, actions = kinds[name]
    assert env.num_actions == actions
    first, _ = env.reset()
    following, reward, terminated, truncated, info = env.step(torch.zeros(2, dtype=torch.long))
    for seen in (first, following, info["final_obs"]):
        assert (tuple(seen.shape), seen.dtype, seen.device.type) == ((2, *shape), dtype, device)
    types = {
        torch.float32: (reward, info["episode"]["r"]),
        torch.bool: (terminated, truncated, info["_final_obs"], info["_episode"]),
        torch.int64: (info["floor"], info["episode"]["l"], info["episode"]["deepest"]),
    }
    for wanted, tensors in types.items():
        for tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == (wanted, (2,))
            assert tensor.device.type == device
    achievements = info["achievements"]
    assert (tuple(achievements.shape), achievements.dtype) == ((2, 0), torch.bool)
    unpacked = env.unpack(following)
    assert tuple(unpacked.shape) == (2, *env.input_shape)
    assert unpacked.dtype == (torch.uint8 if len(shape) == 3 else torch.float32)
    env.close()


def test_images_come_with_channels_first_in_channels_last_memory() -> None:
    env = GymEnv("Picture-v0", 2)
    observations, _ = env.reset()
    assert env.input_shape == (3, 5, 7)
    images = env.unpack(observations)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        assert torch.equal(images[:, channel], observations[..., channel])
    env.close()


def test_what_was_returned_does_not_change_later() -> None:
    """Gymnasium reuses its arrays, and this class its counters."""
    env = GymEnv("Picture-v0", 2)
    observations, _ = env.reset()
    kept = [(observations, observations.clone())]
    for t in range(12):
        returned = env.step(torch.tensor([t % 2, 0]))
        info = returned[4]
        tensors = [*returned[:4], info["final_obs"], *info["episode"].values()]
        kept += [(tensor, tensor.clone()) for tensor in tensors]
    assert all(torch.equal(now, then) for now, then in kept)
    env.close()


def test_last_and_first_images_of_episodes() -> None:
    env = GymEnv("Picture-v0", 2)
    env.reset()
    for t in range(1, 6):
        actions = torch.tensor([0, 2 if t == 3 else 0])
        observations, _, terminated, truncated, info = env.step(actions)
        assert info["final_obs"][0].unique().tolist() == [100 + t]
        assert truncated[0] == (t == 5) and terminated[1] == (t == 3)
        if t == 3:
            assert info["final_obs"][1].unique().tolist() == [103]
            assert info["episode"]["r"].tolist() == [1.5, 1.5]
            assert info["_episode"].tolist() == [False, True]
            assert observations[1].max() < 100  # the new episode's
        if t == 5:
            assert info["episode"]["l"].tolist() == [5, 2]
            assert info["final_obs"][1].unique().tolist() == [102]
            assert observations[0].max() < 100
    env.close()


def test_normalised_images_are_pictured_as_they_were() -> None:
    """Through the ends of episodes, and with the frozen statistics of another."""
    plain = GymEnv("Picture-v0", 2, 1)
    env = GymEnv("Picture-v0", 2, 1, normalize_observations=True)
    env.normalise_as({"normaliser": {"observations": {
        "mean": torch.full((5, 7, 3), 50.0), "var": torch.full((5, 7, 3), 4.0), "count": 1.0,
    }}})  # fmt: skip
    seen, scaled = plain.reset()[0], env.reset()[0]
    for actions in actions_for(env, 12):
        drawn = env.filmed().pictures()
        assert drawn is not None and torch.equal(drawn, seen)
        assert torch.equal(env.images(drawn), plain.images(seen))
        assert not torch.equal(scaled, seen.float()) and float(scaled.max()) == 10
        seen, scaled = plain.step(actions)[0], env.step(actions)[0]
    env.close()


def test_actions_that_do_not_begin_at_0() -> None:
    env = GymEnv("Shifted-v0", 1)
    env.reset()
    assert env.num_actions == 3
    assert not env.step(torch.tensor([0]))[2].any()  # means action 2
    assert env.step(torch.tensor([2]))[2].all()  # means action 4, which ends it
    env.close()


# ---------------------------------------------------------------- seeds and resuming


def played(env: GymEnv, observations: torch.Tensor, steps: int = 60) -> torch.Tensor:
    seen = [observations]
    seen += [env.step(actions)[0] for actions in actions_for(env, steps)]
    return torch.stack(seen)


def test_the_seed_decides_everything() -> None:
    envs = [GymEnv("CartPole-v1", 3, seed=seed) for seed in (1, 1, 2)]
    one, again, other = (played(env, env.reset()[0]) for env in envs)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(played(envs[2], envs[2].reset(seed=1)[0]), one)
    assert len({tuple(row.tolist()) for row in one[0]}) == 3  # each environment its own
    for env in envs:
        env.close()


class Engine(Picture):
    """Holds what has no plain values, as a physics engine does."""

    def __init__(self) -> None:
        super().__init__()
        self.world = threading.Lock()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", [
    "CartPole-v1", "Acrobot-v1", "Picture-v0", "FrozenLake-v1", "Stack-v0",
])  # fmt: skip
def test_resuming_goes_on_bit_for_bit(name: str, scaled: bool, tmp_path: Path) -> None:
    def made() -> GymEnv:
        return GymEnv(name, 3, 1, normalize_observations=scaled, normalize_rewards=scaled)

    env = made()
    assert env.resumable
    played(env, env.reset()[0], 33)
    torch.save(env.state_dict(), tmp_path / "state")
    again = made()
    seen = again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    actions = torch.zeros(3, dtype=torch.long)
    for step in range(60):
        one, other = env.step(actions + step % 2), again.step(actions + step % 2)
        for mine, theirs in zip(one[:4], other[:4], strict=True):
            assert torch.equal(mine, theirs)
        for part in ("r", "l"):
            assert torch.equal(one[4]["episode"][part], other[4]["episode"][part])
    assert seen.shape == one[0].shape
    env.close()
    again.close()


def test_what_is_not_plain_starts_again_from_another_seed_each_time() -> None:
    env = GymEnv("Engine-v0", 3, seed=1)
    first, _ = env.reset()
    assert not env.resumable
    starts = [first]
    for _ in range(3):
        for _ in range(3):
            env.step(torch.zeros(3, dtype=torch.long))
        state = env.state_dict()
        assert state == {"resets": len(starts) - 1}
        env.close()
        env = GymEnv("Engine-v0", 3, seed=1)
        starts.append(env.load_state_dict(state))
        assert env.length.tolist() == [0] * 3 and env.score.tolist() == [0.0] * 3
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 4
    env.close()


def test_resuming_in_the_midst_of_episodes_keeps_their_returns() -> None:
    env = GymEnv("Picture-v0", 2)
    env.reset()
    for _ in range(3):
        env.step(torch.zeros(2, dtype=torch.long))
    env.load_state_dict(env.state_dict())
    for _ in range(2):
        info = env.step(torch.zeros(2, dtype=torch.long))[4]
    assert info["_episode"].all()
    assert info["episode"]["l"].tolist() == [5, 5] and info["episode"]["r"].tolist() == [2.5, 2.5]
    env.close()


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Words-v0", "its actions are Text"),
        ("Pairs-v0", "its actions are Tuple"),
        ("Lists-v0", "it shows Sequence"),
        ("Web-v0", "it shows Graph"),
    ],
)
def test_what_cannot_be_learnt_here_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        GymEnv(name, 2)
    message = str(caught.value)
    assert message.startswith(f"environment {name}: ") and why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "why"), [("CartPole-v99", "v99"), ("NoSuchGame-v0", "NoSuchGame")]
)
def test_unknown_ids_are_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        GymEnv(name, 2)
    assert "\n" not in str(caught.value)


class Lacking(gymnasium.Env):
    """Needs a package that is not there, as CarRacing does without Box2D."""

    def __init__(self) -> None:
        raise gymnasium.error.DependencyNotInstalled("it needs box2d: pip install box2d")


def test_a_lacking_package_is_named_in_one_line() -> None:
    gymnasium.register("Lacking-v0", Lacking)  # type: ignore[arg-type]
    try:
        with pytest.raises(UserError, match="environment Lacking-v0: .*box2d") as caught:
            GymEnv("Lacking-v0", 2)
    finally:
        del gymnasium.registry["Lacking-v0"]
    assert "\n" not in str(caught.value)

"""Every kind of environment keeps the contract: debug ones, gymnasium's, spaces of all sorts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from checker import check_vector_env
from gymnasium import spaces

import envs
from dynmoe.errors import NumericError, UserError
from envs.debug import GAMES

TWO = spaces.Discrete(2)
SHOWN: dict[str, tuple[spaces.Space, tuple[int, ...]]] = {
    "bytes-hwc": (spaces.Box(0, 255, (8, 9, 3), np.uint8), (3, 8, 9)),
    "bytes-chw": (spaces.Box(0, 255, (3, 8, 9), np.uint8), (3, 8, 9)),
    "gray": (spaces.Box(0, 255, (8, 9), np.uint8), (1, 8, 9)),
    "gray-one": (spaces.Box(0, 255, (8, 9, 1), np.uint8), (1, 8, 9)),
    "stack": (spaces.Box(0, 255, (4, 8, 9), np.uint8), (4, 8, 9)),
    "stack-hwc": (spaces.Box(0, 255, (2, 8, 9, 3), np.uint8), (6, 8, 9)),
    "stack-chw": (spaces.Box(0, 255, (2, 3, 8, 9), np.uint8), (6, 8, 9)),
    "float64": (spaces.Box(0, 1, (8, 9, 3), np.float64), (3, 8, 9)),
    "float32-255": (spaces.Box(0, 255, (3, 8, 9), np.float32), (3, 8, 9)),
    "float16": (spaces.Box(-1, 1, (8, 9), np.float16), (1, 8, 9)),
    "uint16": (spaces.Box(0, 65535, (8, 9, 3), np.uint16), (3, 8, 9)),
    "binary": (spaces.Box(0, 1, (8, 9, 3), np.uint8), (3, 8, 9)),
    "unbounded": (spaces.Box(-np.inf, np.inf, (8, 9, 3), np.float32), (3, 8, 9)),
    "table": (spaces.Box(-np.inf, np.inf, (4, 5), np.float64), (20,)),
    "number": (spaces.Box(-1, 1, (), np.float32), (1,)),
    "integers": (spaces.Box(0, 9, (4,), np.int64), (4,)),
    "ram": (spaces.Box(0, 255, (16,), np.uint8), (16,)),
    "discrete": (spaces.Discrete(5), (5,)),
    "multi-discrete": (spaces.MultiDiscrete([3, 4]), (7,)),
    "binaries": (spaces.MultiBinary(4), (4,)),
    "dict": (spaces.Dict(a=spaces.Box(-1, 1, (2, 2)), b=spaces.Discrete(3)), (7,)),
    "tuple": (spaces.Tuple((spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(2))), (4,)),
}
TAKEN: dict[str, spaces.Space] = {
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "box64": spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 5.0]), dtype=np.float64),
    "free": spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
    "multi-discrete": spaces.MultiDiscrete([2, 3], start=[1, 4]),
    "multi-binary": spaces.MultiBinary(3),
    "shifted": spaces.Discrete(3, start=5),
}


class Sampler(gymnasium.Env):
    """Shows samples of its space and takes what the other holds; five steps.

    What is `bad` comes with the first observation, or with action 1.
    """

    def __init__(self, shows: spaces.Space, takes: spaces.Space, bad: Any = None) -> None:
        self.observation_space, self.action_space, self.bad = shows, takes, bad or {}
        self.steps = -1

    def _show(self, spoiled: bool = False) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        shown = self.observation_space.sample()
        if spoiled and "observation" in self.bad:
            shown = np.full_like(shown, self.bad["observation"])
        return shown

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show("reset" in self.bad), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps += 1
        spoiled = bool(self.bad) and action == 1
        reward = self.bad.get("reward", 1.0) if spoiled else 1.0
        return self._show(spoiled), reward, False, self.steps == 5, {}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """One id for all of them; what differs are its arguments."""
    gymnasium.register("Sampler-v0", Sampler)  # type: ignore[arg-type]
    yield
    del gymnasium.registry["Sampler-v0"]


def sampler(shows: spaces.Space, takes: spaces.Space = TWO, seed: int = 3, **how: Any) -> Any:
    bad = how.pop("bad", None)
    return envs.make(
        "Sampler-v0", 2, seed, env_args={"shows": shows, "takes": takes, "bad": bad}, **how
    )


@pytest.mark.parametrize("name", sorted(GAMES))
def test_debug_environments(name: str) -> None:
    assert check_vector_env(lambda seed: envs.make(name, 3, seed), 70) >= 3


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "name",
    ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "MountainCarContinuous-v0",
     "FrozenLake-v1", "Blackjack-v1"],
)  # fmt: skip
def test_gymnasium_environments(name: str, scaled: bool) -> None:
    def make(seed: int) -> Any:
        return envs.make(name, 3, seed, normalize_observations=scaled)

    if name in ("FrozenLake-v1",) or scaled:  # it always starts at one place; statistics move on
        env = make(3)
        env.reset()
        for _ in range(20):
            seen = env.step(env.action_space.sample())[0]
            assert env.observation_space.contains(seen.numpy())
        env.close()
    else:
        check_vector_env(make, 40)


@pytest.mark.parametrize("kind", SHOWN)
def test_what_is_shown(kind: str) -> None:
    space, shape = SHOWN[kind]
    assert check_vector_env(lambda seed: sampler(space, seed=seed), 12) == 4
    env = sampler(space)
    assert env.input_shape == shape
    inputs = env.unpack(env.reset()[0]).float()
    if len(shape) == 3 and kind != "unbounded":  # seen by a network, images are in 0..1
        scale = 255 if env.unpack(env.reset()[0]).dtype == torch.uint8 else 1
        assert inputs.min() >= 0 and 0.5 < inputs.max() / scale <= 1
    env.close()


@pytest.mark.parametrize("together", [spaces.Dict, spaces.Tuple])
def test_bytes_inside_of_others_are_scaled(together: Any) -> None:
    """An image and a number of bytes; what is next to them stays as it is."""
    parts: dict[str, spaces.Space] = {
        "a": spaces.Box(0, 255, (6, 5, 3), np.uint8), "b": spaces.Discrete(3),
        "c": spaces.Box(10, 30, (20,), np.uint8), "d": spaces.Box(-9, 9, (20,), np.float64),
    }  # fmt: skip
    space = together(parts if together is spaces.Dict else parts.values())
    env = sampler(space)
    for seen in (env.reset()[0], env.step([0, 0])[0]):
        assert env.single_observation_space.contains(seen[0].numpy())
        image, chosen, number, speed = seen.split([90, 3, 20, 20], dim=1)
        assert image.min() >= 0 and 0.9 < image.max() <= 1
        assert torch.equal(image * 255, (image * 255).round())
        assert chosen.sum(dim=1).tolist() == [1, 1]
        assert number.min() >= 0 and 0.5 < number.max() <= 1 and speed.abs().max() > 5
    env.close()


@pytest.mark.parametrize("kind", ["bytes-hwc", "bytes-chw", "gray", "stack-hwc", "stack-chw"])
def test_pixels_stand_where_they_stood(kind: str) -> None:
    env = sampler(SHOWN[kind][0])
    seen, _ = env.reset()
    images = env.unpack(seen)
    for c in range(images.shape[1]):
        wanted = {
            "bytes-hwc": lambda c: seen[..., c], "bytes-chw": lambda c: seen[:, c],
            "gray": lambda c: seen, "stack-hwc": lambda c: seen[:, c // 3, ..., c % 3],
            "stack-chw": lambda c: seen[:, c // 3, c % 3],
        }[kind](c)  # fmt: skip
        assert torch.equal(images[:, c], wanted)
    env.close()


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken(kind: str) -> None:
    """The environment asserts that each action is in its space: shifted, clipped, of its type."""
    box = spaces.Box(-1, 1, (2,))
    assert check_vector_env(lambda seed: sampler(box, TAKEN[kind], seed), 12) == 4


# ---------------------------------------------------------------- what is not finite


@pytest.mark.filterwarnings("ignore")  # gymnasium's own about the values
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(what: str, step: int, value: float, scaled: bool) -> None:
    """At the reset, in the first step, and in the last of an episode."""
    if what == "reward" and step == 0:
        return
    bad = {what: value} | ({"reset": True} if step == 0 else {})
    env = sampler(
        spaces.Box(-1, 1, (2,)), bad=bad, normalize_observations=scaled, normalize_rewards=scaled
    )
    with pytest.raises(NumericError) as caught:  # noqa: PT012 - which step it is, it says
        env.reset()
        for t in range(1, 6):
            env.step([0, int(t == step)])
    message, number = str(caught.value), int(step > 0)
    assert f"environment Sampler-v0: {what} of number {number} (of 2) is " in message
    assert f"at step {step};" in message and "\n" not in message
    env.close()


# ---------------------------------------------------------------- normalisation


def test_scaled_observations_and_rewards() -> None:
    """All environments share statistics; last observations are scaled as the others; returns are
    those of the rewards as given."""
    env = envs.make(
        "Pendulum-v1", 4, normalize_observations=True, normalize_rewards=True, gamma=0.9
    )
    plain = envs.make("Pendulum-v1", 4)
    env.reset(), plain.reset()
    seen, raw, score = [], [], torch.zeros(4)
    for t in range(400):
        actions = torch.sin(torch.arange(4.0) + t)[:, None]
        observations, reward, _, truncated, info = env.step(actions)
        given, paid, _, _, other = plain.step(actions)
        score += paid
        if truncated.any():
            torch.testing.assert_close(info["episode"]["r"], score)
            score.zero_()
            statistics = env.state_dict()["normaliser"]["observations"]
            expected = (other["final_obs"] - statistics["mean"]) / statistics["var"].sqrt()
            assert (info["final_obs"] - expected).abs().max() < 0.1
        assert observations.abs().max() <= 10 and reward.abs().max() <= 10
        seen.append(given)
        raw.append(observations)
    given, scaled = torch.cat(seen[200:]), torch.cat(raw[200:])
    assert (scaled.mean(dim=0).abs() < 0.4).all()
    assert ((scaled.std(dim=0) - 1).abs() < 0.4).all()
    statistics = env.state_dict()["normaliser"]["observations"]
    torch.testing.assert_close(statistics["mean"], torch.cat(seen).mean(dim=0), atol=0.1, rtol=0)
    env.close()
    plain.close()


def test_statistics_are_saved_restored_and_frozen() -> None:
    how: dict[str, Any] = {"normalize_observations": True, "normalize_rewards": True}
    env = envs.make("Pendulum-v1", 2, 1, **how)
    env.reset()
    for _ in range(30):
        env.step([[0.5], [1.0]])
    state = env.state_dict()
    after = [envs.make("Pendulum-v1", 2, 1, **how) for _ in range(2)]
    starts = [other.load_state_dict(state) for other in after]
    assert torch.equal(*starts)
    results = [other.step([[0.5], [1.0]]) for other in after]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    frozen = envs.make("Pendulum-v1", 3, 1, **how)  # another number of environments will do
    frozen.normalise_as(state)
    frozen.reset(seed=5)
    frozen.step([[0.0]] * 3)
    for name, saved in state["normaliser"].items():
        for key, value in saved.items():
            assert torch.equal(
                torch.as_tensor(frozen.state_dict()["normaliser"][name][key]),
                torch.as_tensor(value),
            )
    for other in (env, frozen, *after):
        other.close()


# ---------------------------------------------------------------- ids and arguments


def test_a_module_registers_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "games_of_mine.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    (tmp_path / "broken_games.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = envs.make("games_of_mine:Mine-v0", 2, env_args={"g": 5})
        assert env.envs.unwrapped.get_attr("g") == (5, 5)
        env.close()
        for name, why in (
            ("no_such_module:Mine-v0", "'no_such_module' cannot be imported"),
            ("broken_games:Mine-v0", "ZeroDivisionError"),
            ("games_of_mine:Yours-v0", "unknown environment"),
        ):
            with pytest.raises(UserError, match=why) as caught:
                envs.make(name, 2)
            assert "\n" not in str(caught.value)
    finally:
        del gymnasium.registry["Mine-v0"]
        sys.modules.pop("games_of_mine", None)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("Pendulum-v1", {"env_args": {"gravity": 5}}, "unexpected keyword argument 'gravity'"),
        ("Stages-v0", {"env_args": {"g": 5}}, "option of Stages-v0 .g."),
        ("Craftax-Pixels-v1", {"normalize_rewards": True}, "normalize_rewards True"),
        ("Identity-v0", {"normalize_observations": True}, "normalize_observations True"),
    ],
)
def test_what_cannot_be_set_is_refused(name: str, settings: Any, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        envs.make(name, 2, **settings)
    assert "\n" not in str(caught.value)

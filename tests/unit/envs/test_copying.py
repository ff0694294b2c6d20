"""Environments of plain values go on bit for bit, whatever containers, spaces and wrappers hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

from dynmoe.errors import UserError
from envs.gym import GymEnv

DICTS = {
    "defaultdict": lambda: defaultdict(int),
    "lambda": lambda: defaultdict(lambda: 7),
    "Counter": Counter,
    "nested": lambda: defaultdict(list, {"row": [Counter(), defaultdict(float)]}),
}


class Visits(gymnasium.Env):
    """Pays for what was seldom done. Its tables are of a kind, and made in __init__ or `late`."""

    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, kind: str = "defaultdict", late: bool = False) -> None:
        self.kind, self.late, self.time = kind, late, 0
        if not late:
            self.visits: Any = DICTS[kind]()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return 3 * self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if self.late and not hasattr(self, "visits"):
            self.visits = DICTS[self.kind]()
        self.time += 1
        tables = self.visits["row"] if self.kind == "nested" else [self.visits]
        for table in tables:
            table[int(action)] += 1
        seen = 3 * self.np_random.normal(size=3).astype(np.float32)
        return seen, 1 / tables[-1][int(action)], False, self.time == 7, {}


class Nested(Visits):
    """Shows what is drawn from a space of spaces."""

    def __init__(self) -> None:
        super().__init__()
        unit = spaces.Box(0, 1, (2,), np.float32)
        pair = spaces.Tuple((spaces.Discrete(9), unit))
        self.observation_space = spaces.Dict(one=pair, two=spaces.MultiBinary(2))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return (self.observation_space.sample(), *super().step(action)[1:])


class Aliases(gymnasium.Env):
    """Moves a hero that is one of its units, by a second name of its generator, or by another."""

    observation_space = spaces.Box(-9, 9, (4,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, bits: str = "PCG64") -> None:
        self.bits = bits

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time, self.units = 0, [{"at": np.zeros(2)}, {"at": np.ones(2)}]
        self.hero, self.place = self.units[0], self.units[0]["at"]
        made = np.random.Generator(getattr(np.random, self.bits)(0 if seed is None else seed))
        self.rng = self.np_random if self.bits == "PCG64" else made
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        self.hero["at"] += 0.1 * (action - 1) + 0.01 * self.rng.normal()
        return self._seen(), float(self.np_random.normal()), self.time == 30, False, {}

    def _seen(self) -> Any:
        return np.concatenate([unit["at"] for unit in self.units]).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    made: dict[str, Any] = {
        "Visits-v0": Visits, "Nested-v0": Nested, "Aliases-v0": Aliases,
        "Scaled-v0": lambda: NormalizeReward(NormalizeObservation(Visits())),
    }  # fmt: skip
    for name, entry in made.items():
        gymnasium.register(name, entry)
    yield
    for name in made:
        del gymnasium.registry[name]


def check_resumes(made: Any, path: Path) -> None:
    """Through a file, in midst of episodes, and through the ends of others."""
    env, again = made(), made()
    assert env.resumable
    actions = torch.randint(2, (50, 2), generator=torch.Generator().manual_seed(0))
    env.reset(seed=4)
    for each in actions[:17]:
        env.step(each)
    torch.save(env.state_dict(), path)
    again.load_state_dict(torch.load(path, weights_only=True))
    for each in actions[17:]:
        for mine, theirs in zip(env.step(each)[:4], again.step(each)[:4], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["Blackjack-v1", "CliffWalking-v1", "Nested-v0", "Scaled-v0"])
def test_spaces_of_spaces_and_wrappers_of_the_user(name: str, scaled: bool, tmp_path: Path) -> None:
    def made() -> GymEnv:
        return GymEnv(name, 2, 1, normalize_observations=scaled, normalize_rewards=scaled)

    check_resumes(made, tmp_path / "state")


@pytest.mark.parametrize("kind", DICTS)
def test_dictionaries_stay_of_their_kind(kind: str, tmp_path: Path) -> None:
    check_resumes(lambda: GymEnv("Visits-v0", 2, env_args={"kind": kind}), tmp_path / "state")


@pytest.mark.parametrize("bits", ["PCG64", "Philox", "MT19937", "SFC64"])
def test_an_object_with_two_names_stays_one(bits: str, tmp_path: Path) -> None:
    check_resumes(lambda: GymEnv("Aliases-v0", 2, env_args={"bits": bits}), tmp_path / "state")


def test_a_list_that_holds_itself_is_not_plain() -> None:
    env = GymEnv("Visits-v0", 2)
    env.reset()
    assert env.resumable
    ring: list[Any] = []
    ring.append(ring)
    env.envs.envs[0].unwrapped.ring = ring  # type: ignore[attr-defined]
    assert not env.resumable


def test_shared_statistics_are_saved_once() -> None:
    """By their owner; those of a wrapper of the user's with the environment."""
    env = GymEnv("Scaled-v0", 2, normalize_observations=True, normalize_rewards=True)
    env.reset()
    state = env.state_dict()
    kinds = [kind for layer in state["episodes"]["envs"] for kind, _ in layer.values()]
    assert kinds.count("statistics") == 4 and len(state["normaliser"]) == 2


def test_a_table_that_nobody_can_make_is_refused() -> None:
    env = GymEnv("Visits-v0", 2, env_args={"kind": "lambda", "late": True})
    env.reset()
    env.step([0, 1])
    state = env.state_dict()
    again = GymEnv("Visits-v0", 2, env_args={"kind": "lambda", "late": True})
    with pytest.raises(UserError, match="visits cannot be restored: make it in __init__ or reset"):
        again.load_state_dict(state)

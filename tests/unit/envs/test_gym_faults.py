"""What goes wrong inside gymnasium's environments is told in one line, with the step."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import envs
from dynmoe.errors import NumericError, UserError


def serve(pipe: Any) -> None:
    """A game in a process of its own, which dies at its third step."""
    for _ in range(2):
        pipe.send(pipe.recv())
    pipe.recv()
    os._exit(1)


class Faulty(gymnasium.Env):
    """Does what `kind` says at its third step."""

    def __init__(self, kind: str) -> None:
        self.kind, self.steps = kind, 0
        self.observation_space: spaces.Space = spaces.Box(-1, 1, (2,))
        self.action_space: spaces.Space = spaces.Discrete(2)
        if kind == "dies":
            self.pipe, other = multiprocessing.Pipe()
            fork = multiprocessing.get_context("fork")
            self.process = fork.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        seen, reward = np.zeros(2, np.float32), 1.0
        if self.kind == "dies":
            self.pipe.send(0)
            self.pipe.recv()
        if self.steps == 3:
            if self.kind == "raises":
                raise ZeroDivisionError("no ground\nbeneath")
            if self.kind == "grows":
                seen = np.zeros(3, np.float32)
                self.observation_space = spaces.Box(-1, 1, (3,))
            if self.kind == "grows silently":
                seen = np.zeros(3, np.float32)
            if self.kind == "more actions":
                self.action_space = spaces.Discrete(3)
            if self.kind == "nan":
                reward = float("nan")
        return seen, reward, False, False, {}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    gymnasium.register("Faulty-v0", entry_point=Faulty, disable_env_checker=True)
    yield
    del gymnasium.registry["Faulty-v0"]


@pytest.mark.parametrize(
    ("kind", "kinds", "message"),
    [
        ("raises", UserError, "Faulty-v0: step failed at step 3: ZeroDivisionError: no ground ben"),
        ("dies", UserError, "Faulty-v0: step failed at step 3: (EOFError|ConnectionResetError)"),
        ("grows", UserError, r"observations of number 0 \(of 2\) were Box.* and are Box.*step 3"),
        ("grows silently", UserError, "step failed at step 3: ValueError"),
        ("more actions", UserError, r"were Discrete\(2\) and are Discrete\(3\) at step 3; spaces"),
        ("nan", NumericError, "reward of number 0 .* is nan at step 3"),
    ],
)
def test_faults_are_one_line_that_names_the_step(
    kind: str, kinds: type[Exception], message: str
) -> None:
    env = envs.make("Faulty-v0", 2, env_args={"kind": kind})
    env.reset()
    actions = torch.zeros(2, dtype=torch.long)
    for _ in range(2):
        env.step(actions)
    with pytest.raises(kinds, match=message) as caught:
        env.step(actions)
    assert "\n" not in str(caught.value)
    env.close()

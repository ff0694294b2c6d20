"""SlipperyAnt: when its friction changes, to what, and what is said where MuJoCo is missing."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

import envs
from dynmoe.errors import UserError
from envs.slippery import friction


def test_frictions_are_log_uniform_and_belong_to_the_schedule() -> None:
    values = [friction(0, change) for change in range(1, 2001)]
    logs = np.log(np.array(values) / 0.02) / math.log(2 / 0.02)
    assert friction(0, 0) == 1.0 and min(values) >= 0.02 and max(values) <= 2
    for quantile in (0.1, 0.5, 0.9):
        assert abs((logs < quantile).mean() - quantile) < 0.03
    assert values[:5] == [friction(0, change) for change in range(1, 6)]
    assert values[:5] != [friction(1, change) for change in range(1, 6)]


def test_missing_mujoco_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs MuJoCo; run: pip install 'dynmoe\[mujoco\]'"):
        envs.make("SlipperyAnt-v0", 2)


def test_friction_changes_with_the_first_episode_after_it_is_due() -> None:
    pytest.importorskip("mujoco", exc_type=ImportError)
    env = envs.make("SlipperyAnt-v0", 2, env_args={"every": 10, "schedule": 3})
    assert env.single_action_space.shape == (8,) and len(env.input_shape) == 1
    env.reset(seed=0)
    ants = [one.unwrapped for one in env.envs.envs]  # type: ignore[attr-defined]
    for changes, steps in ((0, 10), (1, 10), (2, 1)):
        for ant in ants:
            assert (ant.model.geom_friction[:, 0] == friction(3, changes)).all()
            assert (ant.model.geom_friction[:, 1] == 0.5).all()
        for _ in range(steps):
            _, reward, *_ = env.step(torch.zeros(2, 8))
        assert reward.isfinite().all()
        for ant in ants:  # not before an episode begins
            assert (ant.model.geom_friction[:, 0] == friction(3, changes)).all()
        env.reset()
    env.close()


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 2.5}, {"schedule": -1}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    pytest.importorskip("mujoco", exc_type=ImportError)
    with pytest.raises(UserError, match="must be a whole number") as error:
        envs.make("SlipperyAnt-v0", 2, env_args=options)
    assert "\n" not in str(error.value)

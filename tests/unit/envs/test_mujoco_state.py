"""MuJoCo's environments go on bit for bit: what the simulation holds is saved with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import envs
from envs.gym import GymEnv
from envs.mujoco_state import restore_simulation, simulation_state

pytest.importorskip("mujoco", exc_type=ImportError)
NAMES = ("SlipperyAnt-v0", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Swimmer-v5")


def make(name: str) -> GymEnv:
    own = {"every": 20, "schedule": 3} if name == "SlipperyAnt-v0" else {}
    made = envs.make(
        name, 2, env_args=own, normalize_observations=True, normalize_rewards=True, seed=1
    )
    assert isinstance(made, GymEnv)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    env, again = make(name), make(name)
    assert env.resumable
    shape = (250, 2, *env.single_action_space.shape)
    actions = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
    env.reset(seed=4)
    for each in actions[:45]:
        env.step(each)
    torch.save(env.state_dict(), tmp_path / "state")
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    ended = False
    for each in actions[45:]:
        one, other = env.step(each), again.step(each)
        for mine, theirs in zip(one[:4], other[:4], strict=True):
            assert torch.equal(mine, theirs)
        ended = ended or bool((one[2] | one[3]).any())
    assert ended or name in ("HalfCheetah-v5", "Swimmer-v5")  # theirs last 1,000 steps
    for one, other in zip(env.inner, again.inner, strict=True):
        assert one.data.time == other.data.time
    env.close()
    again.close()


def test_friction_and_gravity_are_restored() -> None:
    ants: list[Any] = [env.inner[0] for env in (make("SlipperyAnt-v0"), make("SlipperyAnt-v0"))]
    one, other = ants
    one.model.geom_friction[:, 0], one.model.opt.gravity[2], one.model.opt.timestep = 0.3, -5, 0.02
    restore_simulation(other.model, simulation_state(one.model))
    assert (other.model.geom_friction[:, 0] == 0.3).all()
    assert (other.model.opt.gravity[2], other.model.opt.timestep) == (-5, 0.02)
    assert type(other.model.opt.iterations) is int


def test_pictures_are_not_saved() -> None:
    model = make("SlipperyAnt-v0").inner[0].model  # type: ignore[attr-defined]
    saved = simulation_state(model)
    assert not [name for name in saved if name.startswith(("tex_", "mesh_", "skin_"))]
    assert sum(tensor.nbytes for tensor in saved.values()) < 100_000 < model.tex_data.nbytes

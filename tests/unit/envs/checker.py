"""What every TorchVectorEnv must do; gymnasium has a checker for single environments only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.vector import TorchVectorEnv

KEYS = {"final_obs", "_final_obs", "episode", "_episode", "achievements", "floor"}


def check_vector_env(make: Callable[[int], TorchVectorEnv], steps: int = 60) -> int:
    """Play `make(seed)`'s environments at random and check all that envs.vector promises.

    Returns:
        how many episodes ended.
    """
    env = make(3)
    _check_spaces(env)
    observations, info = env.reset(seed=3)
    _check_observations(env, observations)
    assert set(info) == {"floor"}
    _check(env, info["floor"], torch.int64)
    score = torch.zeros(env.num_envs, device=env.device)
    length, unlocked = torch.zeros_like(score).long(), torch.zeros(0)
    ends = 0
    for actions in actions_of(env, steps):
        before, (observations, reward, terminated, truncated, info) = unlocked, env.step(actions)
        done = terminated | truncated
        ends += int(done.sum())
        _check_step(env, observations, reward, terminated, truncated, info)
        score, length = score + reward, length + 1
        assert torch.allclose(info["episode"]["r"][done], score[done], atol=1e-4)
        assert torch.equal(info["episode"]["l"][done], length[done])
        unlocked = info["achievements"]
        assert len(before) == 0 or (unlocked | ~before).all()
        unlocked = unlocked & ~done[:, None]
        score, length = score.masked_fill(done, 0), length.masked_fill(done, 0)
    _check_unpack(env, observations)
    _check_repeats(make, steps)
    _check_resets(make)
    _check_actions(make)
    env.close()
    return ends


def actions_of(env: TorchVectorEnv, steps: int, seed: int = 0) -> list[Tensor]:
    """Random actions [N, ...] for each step."""
    generator = torch.Generator().manual_seed(seed)
    space = env.single_action_space
    if isinstance(space, spaces.Discrete):
        drawn = torch.randint(env.num_actions, (steps, env.num_envs), generator=generator)
    else:
        assert isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary)
        drawn = torch.rand(steps, env.num_envs, *space.shape, generator=generator)
        if isinstance(space, spaces.Box):  # also beyond the bounds
            width = torch.from_numpy(np.where(np.isfinite(space.high), 2 * space.high, 2.0))
            drawn = ((2 * drawn - 1) * width).float()
        else:
            most = space.nvec if isinstance(space, spaces.MultiDiscrete) else 2
            drawn = (drawn * torch.as_tensor(most)).long()
    return list(drawn.to(env.device))


def play(env: TorchVectorEnv, actions: list[Tensor]) -> list[Any]:
    """All that the steps return, copied."""
    return [copied(env.step(each)) for each in actions]


def copied(values: Any) -> Any:
    """A nest of tensors, each cloned."""
    if isinstance(values, dict):
        return {name: copied(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [copied(value) for value in values]
    return values.clone() if isinstance(values, Tensor) else values


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Two nests of tensors are equal bit for bit."""
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


def _check_spaces(env: TorchVectorEnv) -> None:
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert isinstance(env.single_observation_space, spaces.Box)
    acts = env.single_action_space
    assert isinstance(
        acts, spaces.Discrete | spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary
    )
    if isinstance(acts, spaces.Discrete):
        assert acts.start == 0 and env.num_actions == acts.n
    if isinstance(acts, spaces.MultiDiscrete):
        assert not acts.start.any()
    assert env.observation_space == batch_space(env.single_observation_space, env.num_envs)
    assert env.action_space == batch_space(env.single_action_space, env.num_envs)
    assert env.num_floors >= 1 and len(set(env.achievements)) == len(env.achievements)


def _check(env: TorchVectorEnv, values: Tensor, dtype: torch.dtype, *shape: int) -> None:
    assert values.dtype == dtype and values.shape == (env.num_envs, *shape)
    assert values.device.type == env.device.type


def _check_observations(env: TorchVectorEnv, observations: Tensor) -> None:
    box = env.single_observation_space
    assert box.shape is not None
    _check(env, observations, torch.from_numpy(np.zeros(0, box.dtype)).dtype, *box.shape)
    assert env.observation_space.contains(observations.cpu().numpy())


def _check_step(
    env: TorchVectorEnv,
    observations: Tensor,
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    info: dict[str, Any],
) -> None:
    _check_observations(env, observations)
    _check_observations(env, info["final_obs"])
    _check(env, reward, torch.float32)
    _check(env, terminated, torch.bool)
    _check(env, truncated, torch.bool)
    assert set(info) == KEYS and set(info["episode"]) == {"r", "l", "deepest"}
    done = terminated | truncated
    assert torch.equal(info["_final_obs"], done) and torch.equal(info["_episode"], done)
    assert torch.equal(info["final_obs"][~done], observations[~done])
    _check(env, info["episode"]["r"], torch.float32)
    _check(env, info["episode"]["l"], torch.int64)
    _check(env, info["episode"]["deepest"], torch.int64)
    _check(env, info["achievements"], torch.bool, len(env.achievements))
    _check(env, info["floor"], torch.int64)
    assert ((info["floor"] >= 0) & (info["floor"] < env.num_floors)).all()
    deepest = info["episode"]["deepest"]
    assert ((deepest >= info["floor"]) & (deepest < env.num_floors))[~done].all()


def _check_unpack(env: TorchVectorEnv, observations: Tensor) -> None:
    inputs = env.unpack(observations)
    assert inputs.shape == (env.num_envs, *env.input_shape)
    if len(env.input_shape) == 3:
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        assert inputs.dtype in (torch.uint8, torch.float32)
    else:
        assert inputs.dtype == torch.float32


def _check_repeats(make: Callable[[int], TorchVectorEnv], steps: int) -> None:
    """The same seed gives the same stream, in the same object and in another; another does not."""
    one, other = make(3), make(4)
    actions = actions_of(one, min(steps, 20))
    streams = []
    for env, seed in ((one, 3), (one, 3), (other, 3), (other, 4)):
        first = copied(env.reset(seed=seed))
        streams.append([first, *play(env, actions)])
    assert_same(streams[0], streams[1])
    assert_same(streams[0], streams[2])
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(streams[0], streams[3], strict=True))
    one.close()
    other.close()


def _check_resets(make: Callable[[int], TorchVectorEnv]) -> None:
    """Without a seed a reset goes on: first as the seed it was made with says, then elsewhere."""
    env, other = make(3), make(4)
    starts = [copied(env.reset()[0]) for _ in range(4)]
    assert torch.equal(starts[0], other.reset(seed=3)[0])
    assert not all(torch.equal(starts[0], start) for start in starts[1:])
    assert_same([other.reset()[0] for _ in range(3)], starts[1:])
    assert torch.equal(env.reset(seed=3)[0], starts[0])
    env.close()
    other.close()


def _check_actions(make: Callable[[int], TorchVectorEnv]) -> None:
    """Tensors, arrays, lists and gymnasium's samples are actions; other shapes are named."""
    env = make(3)
    actions = actions_of(env, 1)[0]
    streams = []
    for same in (actions, actions.cpu().numpy(), actions.tolist()):
        env.reset(seed=3)
        streams.append(copied(env.step(same)))
    assert_same(streams[0], streams[1])
    assert_same(streams[0], streams[2])
    env.step(env.action_space.sample())
    shape = [env.num_envs + 1, *actions.shape[1:]]
    for wrong in (torch.zeros(shape).to(actions), np.zeros(shape), "left", [[1], [1, 2]]):
        with pytest.raises(ValueError, match="actions must be"):
            env.step(wrong)
    if not actions.is_floating_point():
        for wrong in (actions + 1000, actions - 1000, actions.float()):
            with pytest.raises(ValueError, match="actions must be"):
                env.step(wrong)
    else:
        with pytest.raises(ValueError, match="actions must be finite"):
            env.step(torch.full_like(actions, torch.nan))
    env.close()

"""A part of some environments plays as these environments do among all."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker import actions_of, assert_same, copied
from conftest import FEW, FULL
from torch import Tensor

import envs
from dynmoe.errors import UserError
from envs.vector import TorchVectorEnv

Make = Callable[[tuple[int, int]], TorchVectorEnv]
"""part -> environments"""


def of_stages(num_envs: int, **options: int) -> Make:
    return lambda part: envs.make("Stages-v0", num_envs, seed=4, env_args=options, part=part)


def of_craftax(name: str, num_envs: int, **settings: Any) -> Make:
    return lambda part: envs.make(name, num_envs, seed=4, part=part, **settings)


def rows_of(values: Any, rows: slice) -> Any:
    """The rows of a nest of tensors [N, ...]."""
    if isinstance(values, dict):
        return {name: rows_of(value, rows) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [rows_of(value, rows) for value in values]
    assert isinstance(values, Tensor)
    return values[rows]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_parts(make: Make, parts: int, steps: int) -> int:
    """Compare all environments with those of their parts, and of parts that go on from a state.

    Returns:
        how many episodes ended.
    """
    whole, own = make((0, 1)), [make((r, parts)) for r in range(parts)]
    assert [env.whole for env in (whole, *own)] == [whole.num_envs] * (1 + parts)
    assert sum(env.num_envs for env in own) == whole.num_envs
    expected = copied(whole.reset(seed=2))
    for env in own:
        assert_same(copied(env.reset(seed=2)), list(rows_of(expected, env.rows)))
    ends = 0
    for t, actions in enumerate(actions_of(whole, steps)):
        if t == steps // 3:
            own = [make((r, parts)) for r in range(parts)]
            saved = through_a_file(whole.state_dict())
            for env in own:
                assert torch.equal(env.load_state_dict(saved), expected[0][env.rows])
        if t == steps // 2:
            expected = copied(whole.reset())
            for env in own:
                assert_same(copied(env.reset()), list(rows_of(expected, env.rows)))
        expected = copied(whole.step(actions))
        ends += int(expected[4]["_episode"].sum())
        for env in own:
            assert_same(copied(env.step(actions[env.rows])), rows_of(expected, env.rows))
            assert env.phase == whole.phase
        if t % 5 == 4:
            joined = own[0].joined_state([env.state_dict() for env in own])
            assert_same(joined, whole.state_dict())
    return ends


@pytest.mark.parametrize("parts", [2, 6])
@pytest.mark.parametrize("options", [{}, {"need": 2, "longest": 5, "sights": 3}])
def test_parts_of_stages(parts: int, options: dict[str, int]) -> None:
    assert check_parts(of_stages(6, **options), parts, steps=90) >= 12


def test_halves_of_craftax_go_on_from_the_state_of_both() -> None:
    """Also where all begin an episode with the next step, or some do."""
    make = of_craftax("Craftax-Classic-Pixels-v1", 2 * FEW, max_timesteps=9)
    halves = [make((r, 2)) for r in range(2)]
    first = [env.reset()[0].clone() for env in halves]
    assert len(torch.cat(first).unique(dim=0)) == 2 * FEW
    for count in (4, 5, 9):
        for env in halves:
            for actions in actions_of(env, count, seed=env.first):
                seen = env.step(actions)[0]
        joined = through_a_file(halves[0].joined_state([env.state_dict() for env in halves]))
        assert len(joined["waiting"]) == (0 if count == 4 else 2 * FEW)
        others = [make((r, 2)) for r in range(2)]
        again = [env.load_state_dict(joined) for env in others]
        assert torch.equal(again[1], seen)
        for one, other in zip(halves, others, strict=True):
            actions = actions_of(one, 1)[0]
            assert_same(copied(one.step(actions)), copied(other.step(actions)))
        for env in halves:  # back to where they were before this step
            env.load_state_dict(joined)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Craftax-Classic-Pixels-v1", "Craftax-Classic-Symbolic-v1"])
def test_parts_of_craftax(name: str) -> None:
    make = of_craftax(name, FEW, max_timesteps=9)
    assert check_parts(make, 2, steps=40) >= 4 * FEW


@pytest.mark.slow
def test_parts_of_phases() -> None:
    """Phases end after the steps of all environments; full Craftax takes minutes to compile."""
    options = {"floors": [0, 2], "steps": 5 * FULL, "max_timesteps": 4}
    make = of_craftax("Craftax-Phases-v1", FULL, env_args=options)
    assert check_parts(make, FULL, steps=20) >= 3 * FULL
    part = make((1, FULL))
    assert part.on_phase(1).num_envs == FULL


def test_what_cannot_be_divided() -> None:
    whole = envs.make("CartPole-v1", 3, part=(1, 2))
    assert (whole.part, whole.num_envs, whole.whole, whole.first) == ((0, 1), 3, 3, 0)
    for name in ("Stages-v0", "Craftax-Classic-Pixels-v1", "Craftax-Phases-v1"):
        with pytest.raises(UserError, match=r"num_envs 5 .* 2 equal parts.* such as 6"):
            envs.make(name, 5, part=(1, 2))

"""Shifts, returns on phases, routing along episodes, and the numbers of a run with phases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import envs
from agents.actor_critic import ActorCritic
from agents.phases import METRICS, Shifts, consistency, figure, levels, returns_on_phases
from agents.rollout import Rollout
from agents.settings import Config
from dynmoe import rl
from dynmoe.errors import UserError
from dynmoe.lab.config import parse
from envs.debug import Stages


def rollout_on(floors: Tensor) -> Rollout:
    """A rollout of which nothing but the floors [T, N] is known."""
    none = torch.zeros(0)
    return Rollout(
        observations=none, actions=none, log_probs=none, values=none, rewards=none, dones=none,
        last_value=none, next_observations=none, floors=floors, next_floors=floors[-1], gates={},
    )  # fmt: skip


def test_a_stage_begins_when_more_than_half_have_been_there() -> None:
    shifts = Shifts()
    half = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
    more = torch.tensor([[0, 2, 2, 0], [2, 0, 0, 0]])
    assert shifts.see(8, rollout_on(half), None, 3) is None
    assert shifts.see(16, rollout_on(more), None, 3) == 2
    assert shifts.see(24, rollout_on(more), None, 3) is None
    assert shifts.begun == [[0, 0], [2, 16]]
    told = Shifts()  # the environment's own phase counts, not the floors
    assert told.see(8, rollout_on(more), 0, 3) is None
    assert told.see(16, rollout_on(half), 1, 3) == 1 and told.begun[-1] == [1, 16]


def test_the_first_stage_is_no_shift() -> None:
    shifts = Shifts(2)
    assert shifts.see(8, rollout_on(torch.full((2, 4), 2)), None, 6) is None
    assert shifts.see(16, rollout_on(torch.full((2, 4), 3)), None, 6) == 3
    assert shifts.begun == [[2, 0], [3, 16]]


@pytest.fixture
def summary() -> dict[str, Any]:
    """A run of three phases of 40 steps, looked at every 10; growth at the second shift."""
    returns = [1, 2, 3, 4, 1, 3, 5, 10, -4, None, -2, -2]
    return {
        "env_steps": 120,
        "curve": [[10 * (i + 1), value] for i, value in enumerate(returns)],
        "shifts": [[0, 0], [1, 40], [2, 80]],
        "stage_floors": [0, 2, 5],
        "phase_returns": [[40, [4.0]], [80, [3.0, 10.0]], [120, [1.0, 6.0, -2.0]]],
        "played_shares": [[1.0], [0.9, 0.8], [0.25, 0.35, 0.7]],
        "growth": [{"step": 80}],
        "newest_shares": [
            [80, [[0, 1.0], [2, 1.0]]],
            [90, [[0, 0.5], [2, 0.3], [5, 0.6]]],
            [120, [[0, 0.2], [2, 0.4], [4, 0.3], [5, 0.9]]],
        ],
        "routing": {"router/segment_routing/a": 0.5, "router/segment_routing/b": 0.7},
    }


def test_the_numbers_of_a_run_with_phases(summary: dict[str, Any]) -> None:
    assert [level for _, level in levels(summary)] == [4, 10, -2]
    assert levels(summary)[1][0] == [[10, 1], [20, 3], [30, 5], [40, 10]]
    wanted = {
        "phase_return": (4 + 10 - 2) / 3,
        "recovery": (40 + 30) / 2,  # 10 >= 9 after 40 steps; -2 >= -2.2 after 30, one look unknown
        "earlier_return": (1 + 6) / 2,
        "forgetting": ((4 - 1) + (10 - 6)) / 2,
        "last_stage": 80.0,
        "newest_at_first": 0.6,
        "newest_on_new": 0.9,
        "newest_on_old": (0.2 + 0.4 + 0.3) / 3,
        "segment_routing": 0.6,
    }
    for metric, value in wanted.items():
        assert figure(summary, metric) == pytest.approx(value), metric
    missing = set(METRICS) - set(wanted)
    assert missing == {"floor_information", "segment_cache"}
    assert all(math.isnan(figure(summary, metric)) for metric in missing)


def test_shares_where_nobody_is_any_more_are_those_played(summary: dict[str, Any]) -> None:
    gone = summary | {"newest_shares": [[90, [[5, 0.6]]], [120, [[6, 1.0]]]]}
    assert figure(gone, "newest_on_old") == pytest.approx(0.3)
    assert figure(gone, "newest_on_new") == 0.7 and figure(gone, "newest_at_first") == 0.6


def test_a_run_without_shifts_has_no_numbers_of_them(summary: dict[str, Any]) -> None:
    alone = summary | {"shifts": [[0, 0]], "phase_returns": [], "growth": []}
    for metric in ("recovery", "earlier_return", "forgetting", "newest_on_new"):
        assert math.isnan(figure(alone, metric))
    assert figure(alone, "last_stage") == 120 and figure(alone, "phase_return") == pytest.approx(-2)


def test_consistency_is_of_the_top_expert() -> None:
    """Eight steps of expert 1, then eight of expert 0: windows of 8 have i of one, 8 - i of it."""
    top = torch.tensor([1] * 8 + [0] * 8)
    gates = 0.4 + 0.2 * torch.nn.functional.one_hot(top, 3)
    found = consistency({"actor": gates}, 3)
    most = [max(8 - i, i) for i in range(9)]
    single = [2 * hits / (8 + 8) for hits in most]
    srp = sum(max(one, 2 * 8 / (16 + 8)) for one in single) / 9
    assert found["router/segment_routing/actor"] == pytest.approx(srp)
    assert found["router/segment_cache/actor"] == pytest.approx(sum(most) / (9 * 8))
    assert consistency({"actor": gates}, 1) == {}


def test_returns_on_phases_count_first_episodes(skilled: ActorCritic) -> None:
    """A skilled player of Stages gets less of the game the later it begins; training goes on."""
    env = Stages("Stages-v0", 32)
    env.reset(seed=1)
    before, drawn = env.state_dict(), torch.random.get_rng_state()
    found_and_shares = returns_on_phases(env, skilled, 3, seed=0)
    found, shares = found_and_shares
    assert found_and_shares == returns_on_phases(env, skilled, 3, seed=0)
    assert found != returns_on_phases(env, skilled, 3, seed=1)[0]
    assert len(shares) == 3 and all(0 < share < 1 for share in shares)
    assert 18 >= found[0] > found[1] > found[2] > 3 and found[2] <= 6
    assert torch.equal(drawn, torch.random.get_rng_state())
    after = env.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def settings(folder: Path, *flags: str) -> Config:
    game = {"need": 2, "longest": 32}
    argv = ["--preset", "smoke", "--env-args", json.dumps(game), "--runs-dir", str(folder),
            "--name", "x", "--total-steps", "4096", "--probe-every", "2", *flags]  # fmt: skip
    return parse(rl.presets(), argv, "rl", "")[1]


def test_a_run_tells_of_its_shifts_and_resets_the_head_there(tmp_path: Path) -> None:
    flags = ("--method", "dense", "--intervention", "head-reset", "--phase-returns")
    rl.run(settings(tmp_path, *flags))
    summary = json.loads((tmp_path / "rl/x/seed-0/summary.json").read_text())
    stages = [stage for stage, _ in summary["shifts"]]
    assert stages[0] == 0 and stages[-1] == 2 and summary["stage_floors"] == [0, 1, 2]
    played = summary["phase_returns"]
    assert [len(returns) for _, returns in played] == [*stages[1:], 3]
    assert played[-1][0] == 4096 and all(0 <= r <= 6 for _, returns in played for r in returns)


def test_a_run_does_not_grow_on_the_floor_that_it_begins_on(tmp_path: Path) -> None:
    game = json.dumps({"need": 32, "first": 1})  # nobody gets further
    rl.run(settings(tmp_path, "--env-args", game, "--trigger", "stage", "--total-steps", "512"))
    summary = json.loads((tmp_path / "rl/x/seed-0/summary.json").read_text())
    assert summary["growth"] == [] and summary["shifts"] == [[1, 0]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--env", "CartPole-v1", "--phase-returns"), "CartPole-v1 has no phases"),
        (("--intervention", "ewc"), "intervention ewc acts at the end of tasks"),
    ],
)
def test_what_needs_phases_is_refused_without(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rl.run(settings(tmp_path, *flags))


def test_which_environments_have_floors() -> None:
    assert envs.has_phases("Stages-v0") and envs.has_phases("Craftax-Phases-v1")
    assert envs.has_floors("Craftax-Symbolic-v1") and not envs.has_phases("Craftax-Symbolic-v1")
    assert not envs.has_floors("Craftax-Classic-Pixels-v1") and not envs.has_floors("CartPole-v1")

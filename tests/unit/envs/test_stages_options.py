"""Stages-v0 whose floors come after learning: rows of right actions, sights, first floors."""

from __future__ import annotations

import io

import pytest
import torch

import envs
from dynmoe.errors import UserError
from envs.debug import Stages

ROWS = {"need": 3, "floors": 4, "symbols": 5, "longest": 20}


def right_actions(observations: torch.Tensor) -> torch.Tensor:
    return observations.long().sum(dim=1) % 4


def test_rows_of_right_actions_against_the_rules() -> None:
    """Each environment by itself: a wrong action ends the row, records pay, rows lead on."""
    env = Stages("Stages-v0", 6, 1, **ROWS)
    g = torch.Generator().manual_seed(0)
    seen, _ = env.reset()
    floors, rows, best, length = [0] * 6, [0] * 6, [0] * 6, [0] * 6
    ends = {"over": 0, "cut": 0}
    for _ in range(400):
        right = torch.rand(6, generator=g) < 0.8
        actions = torch.where(right, right_actions(seen), (right_actions(seen) + 1) % 4)
        assert seen[:, 0].tolist() == floors and int(seen[:, 1].max()) < 5
        seen, reward, terminated, truncated, info = env.step(actions)
        for i, good in enumerate(right.tolist()):
            length[i] += 1
            rows[i] = rows[i] + 1 if good else 0
            assert reward[i] == (rows[i] > best[i])
            best[i] = max(best[i], rows[i])
            over = rows[i] == 3 and floors[i] == 3
            cut = length[i] == 20 and not over
            assert (bool(terminated[i]), bool(truncated[i])) == (over, cut)
            ends["over"] += over
            ends["cut"] += cut
            if rows[i] == 3:
                floors[i], rows[i], best[i] = min(floors[i] + 1, 3), 0, 0
            if over or cut:
                assert info["episode"]["deepest"][i] == floors[i]
                floors[i] = rows[i] = best[i] = length[i] = 0
    assert min(ends.values()) > 5 and env.max_return == 12


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"need": 3, "floors": 4, "first": 2}, 6),
        ({"need": 5, "longest": 8}, 8),
        ({"first": 1}, 12),
        ({"longest": 7}, 7),
        ({"floors": 1, "longest": 7}, 7),
    ],
)
def test_the_most_is_what_the_best_play_returns(options: dict[str, int], most: int) -> None:
    env = Stages("Stages-v0", 2, **options)
    seen, _ = env.reset()
    for _ in range(40):
        seen, *_, info = env.step(right_actions(seen))
        assert not info["_episode"].any() or info["episode"]["r"].tolist() == [most] * 2
    assert env.max_return == most


def test_every_floor_has_sights_of_its_own() -> None:
    """The game's, whatever the seed; and fewer numbers than symbols, so that floors share them."""
    options = {"floors": 3, "symbols": 4, "sights": 7}
    env, other = (Stages("Stages-v0", 2, seed, **options) for seed in (0, 1))
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(4)).to(torch.uint8)
    looks = env.unpack(everything)
    assert env.input_shape == (7,) and looks.shape == (12, 7)
    assert len(looks.unique(dim=0)) == 12 and int(torch.linalg.matrix_rank(looks)) == 7
    assert torch.equal(looks, other.unpack(everything))


def test_actions_at_random_hardly_leave_the_first_floor() -> None:
    env = envs.make("Stages-v0", 64, env_args={"need": 6, "longest": 64})
    g = torch.Generator().manual_seed(0)
    env.reset()
    deepest = []
    for _ in range(64):
        *_, info = env.step(torch.randint(4, (64,), generator=g))
        deepest += info["episode"]["deepest"][info["_episode"]].tolist()
    assert len(deepest) >= 64 and sum(d > 0 for d in deepest) / len(deepest) < 0.05


def test_whole_floats_are_numbers() -> None:
    """As JSON has them."""
    env = Stages("Stages-v0", 2, floors=4.0, longest=1e2)  # type: ignore[arg-type]
    assert (env.num_floors, env.options.longest) == (4, 100)
    assert env.options == Stages("Stages-v0", 2, floors=4, longest=100).options


@pytest.mark.parametrize("at", [7, 33])
def test_resuming_with_options_is_exact(at: int) -> None:
    env = Stages("Stages-v0", 3, 2, **ROWS)
    seen, _ = env.reset()
    for step in range(at):
        seen = env.step(right_actions(seen) if step % 4 else torch.zeros(3).long())[0]
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    other = Stages("Stages-v0", 3, 9, **ROWS)
    assert torch.equal(other.load_state_dict(torch.load(file, weights_only=True)), seen)
    for step in range(60):
        actions = right_actions(seen) if step % 5 else torch.ones(3).long()
        one, again = env.step(actions), other.step(actions)
        assert all(torch.equal(a, b) for a, b in zip(one[:4], again[:4], strict=True))
        seen = one[0]


def test_a_phase_begins_on_its_floor() -> None:
    env = Stages("Stages-v0", 2, **ROWS)
    assert env.num_phases == 4
    later = env.on_phase(2)
    seen, info = later.reset()
    assert seen[:, 0].tolist() == info["floor"].tolist() == [2, 2]
    for _ in range(20):
        seen, *_, info = later.step((right_actions(seen) + 1) % 4)
    assert info["_episode"].all() and seen[:, 0].tolist() == [2, 2]
    assert env.reset()[0][:, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need": -1}, "need=-1 must be in 0..32"),
        ({"need": 33}, "need=33 must be in 0..32"),
        ({"first": 3}, "first=3 must be in 0..2"),
        ({"sights": 2.5}, "sights=2.5 must be in"),
        ({"floors": "3"}, "floors='3' must be in 1..256, a whole number"),
        ({"longest": "96"}, "longest='96' must be in 1.."),
        ({"longest": None}, "longest=None must be in 1.."),
        ({"need": [2]}, r"need=\[2\] must be in 0..32"),
        ({"need": 2, "floors": 1}, "leads nowhere with one floor"),
        ({"sight": 8}, "unknown option of Stages-v0 'sight'.*Did you mean 'sights'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        envs.make("Stages-v0", 2, env_args=options)
    assert "\n" not in str(error.value)

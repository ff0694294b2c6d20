"""Craftax in phases: what players carry on each floor, when phases end, and resuming there."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL

import envs
from dynmoe.errors import UserError
from envs import craftax_game
from envs.craftax_kits import CARRIED, DONE, FLOORS, equipped, unlocked

NAME = "Craftax-Phases-v1"
KEYS = {"final_obs", "_final_obs", "episode", "_episode", "achievements", "floor", "phase"}


@pytest.fixture(scope="module")
def blank() -> Any:
    """A world of zeros, with ladders in places of their own."""
    import jax

    world = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), craftax_game._world(False))
    ladders = np.arange(2 * FLOORS, dtype=np.int32).reshape(FLOORS, 2)
    return jax.tree.map(jax.numpy.asarray, world.replace(up_ladders=ladders))


@pytest.mark.parametrize("floor", range(FLOORS))
def test_kits_are_the_lists_and_pay_nothing(floor: int, blank: Any) -> None:
    from craftax.craftax import constants
    from craftax.craftax.game_logic import calculate_inventory_achievements

    state = equipped(blank, floor)
    assert state.player_level == floor
    for name, counts in CARRIED.items():
        assert len(counts) == FLOORS and getattr(state.inventory, name) == counts[floor]
    if floor:
        assert state.player_position.tolist() == [2 * floor, 2 * floor + 1]
        stats = (state.player_strength, state.player_dexterity, state.player_intelligence)
        assert sum(map(int, stats)) == 3 + floor and max(stats) - min(stats) <= 1
        assert state.player_health == 8 + stats[0] and state.player_drink == 7 + 2 * stats[1]
        assert state.player_mana == 6 + 3 * stats[2]
    assert (state.monsters_killed >= 8).tolist() == [f < floor for f in range(FLOORS)]
    assert np.array_equal(calculate_inventory_achievements(state).achievements, state.achievements)
    known = [constants.Achievement(int(i)).name.lower() for i in np.flatnonzero(state.achievements)]
    assert unlocked(floor) <= set(known) and (floor > 0) == bool(known)
    names = ("dungeon", "gnomish_mines", "sewers", "vault", "troll_mines", "fire_realm",
             "ice_realm", "graveyard")  # fmt: skip
    entered = {name for name in known if name.startswith("enter_")}
    assert entered == {f"enter_{name}" for name in names[:floor]}
    again = equipped(state, floor)
    for one, other in zip(*(craftax_game.by_name(s).items() for s in (state, again)), strict=True):
        assert one[0] == other[0] and np.array_equal(one[1], other[1]), one[0]


def test_what_is_done_is_in_upstreams_words() -> None:
    from craftax.craftax.constants import Achievement

    names = [name for floor in DONE for name in floor]
    assert len(set(names)) == len(names) and len(DONE) == FLOORS - 1
    assert all(name.upper() in Achievement.__members__ for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floors": [0, 9]}, "phase 1 begins on floor 9, and Craftax has floors 0 to 8"),
        ({"floors": [-1]}, "phase 0 begins on floor -1"),
        ({"floors": []}, "must name the floor of each phase"),
        ({"floors": 2}, "must name the floor of each phase"),
        ({"floors": [0, 1], "steps": [5]}, "one for each of the 2 phases"),
        ({"steps": 0}, "of at least 1"),
        ({"steps": 1.5}, "steps=1.5 must be one whole number"),
        ({"steps": "1000"}, "steps='1000' must be one whole number"),
        ({"steps": None}, "steps=None must be one whole number"),
        ({"floors": "01"}, "phase 0 begins on floor '0'"),
        ({"steps": 1e6, "max_timesteps": "400"}, "max_timesteps '400' cannot be; use a whole"),
        ({"floors": [0.0, 1.0], "steps": [1e6, 2e6], "max_timesteps": 1.5}, "max_timesteps 1.5"),
        ({"floor": [1]}, "unknown option of Craftax-Phases-v1 'floor'.*'floors'"),
        ({"observation": "vector"}, "unknown observation 'vector'"),
    ],
)
def test_bad_phases_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        envs.make(NAME, 2, env_args=options)
    assert "\n" not in str(error.value)


def phases(seed: int = 0, **options: Any) -> Any:
    usual = {"observation": "symbolic", "floors": [0, 2, 8], "steps": [11, 20, 5]}
    return envs.make(NAME, FULL, seed, env_args=usual | options)


@pytest.mark.slow  # compiling the full game takes minutes
def test_phases_end_when_their_steps_are_done() -> None:
    """With 2 environments the first ends with its sixth step, the second with its sixteenth."""
    env = phases()
    assert env.num_phases == 3 and env.max_return is None
    _, info = env.reset()
    assert info["floor"].tolist() == [0, 0]
    noop = torch.zeros(FULL, dtype=torch.long)
    for step in range(1, 24):
        _, reward, terminated, truncated, info = env.step(noop)
        phase = (step >= 6) + (step >= 16)
        assert info.keys() == KEYS and info["phase"].tolist() == [phase] * FULL
        assert env.phase_played == (step > 6) + (step > 16)
        ends = step in (6, 16)
        assert (terminated | truncated).all() if ends else not truncated.any()
        assert info["floor"][info["_episode"]].eq([0, 2, 8][phase]).all()
        if step in (7, 17):  # what the kit unlocks pays nothing
            assert reward.tolist() == [0, 0]
        if ends:
            assert info["episode"]["deepest"].tolist() == [[0, 2][phase - 1]] * FULL
    assert env.reset()[1]["floor"].tolist() == [8, 8]
    assert env.reset(seed=0)[1]["floor"].tolist() == [0, 0]
    alone = env.on_phase(1)
    assert alone.num_phases == 1 and alone.reset()[1]["floor"].tolist() == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 6, 9, 16])
def test_resuming_across_phases_is_exact(at: int) -> None:
    """Also where all environments wait to begin in a new phase."""
    env, g = phases(seed=4), torch.Generator().manual_seed(at)
    seen, _ = env.reset()

    def actions() -> torch.Tensor:
        return torch.randint(43, (FULL,), generator=g)

    for _ in range(at):
        seen = env.step(actions())[0]
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    state, other = torch.load(file, weights_only=True), phases(seed=9)
    assert torch.equal(other.load_state_dict(state), seen)
    for _ in range(20):
        chosen = actions()
        one, again = env.step(chosen), other.step(chosen)
        assert all(torch.equal(a, b) for a, b in zip(one[:4], again[:4], strict=True))
        for name in ("floor", "phase", "achievements"):
            assert torch.equal(one[4][name], again[4][name])
    with pytest.raises(UserError, match="phases with bounds"):
        phases(steps=7).load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("observation", ["codes", "pixels", "symbolic"])
def test_observations_are_those_of_craftax(observation: str) -> None:
    """On floor 0 the phases are Craftax itself."""
    own = envs.make(NAME, FULL, 3, env_args={"observation": observation, "floors": [0]})
    symbolic = observation == "symbolic"
    name = f"Craftax-{'Symbolic' if symbolic else 'Pixels'}-v1"
    other = envs.make(name, FULL, 3, observation=None if symbolic else observation)
    assert own.single_observation_space == other.single_observation_space
    assert own.input_shape == other.input_shape
    one, two = own.reset()[0], other.reset()[0]
    for step in range(10):
        assert torch.equal(one, two) and torch.equal(own.unpack(one), other.unpack(two))
        actions = torch.full((FULL,), step % 5)
        one, two = own.step(actions)[0], other.step(actions)[0]


@pytest.mark.slow  # compiling the full game takes minutes
def test_what_is_not_observed_can_be_drawn() -> None:
    """The codes of a symbolic world are those of the same world in pixels, new episodes too."""
    symbolic, pixels = (phases(4, observation=o, max_timesteps=4) for o in ("symbolic", "codes"))
    assert symbolic.pictured and symbolic.filmed() is symbolic and pixels.pictures() is None
    symbolic.reset()
    seen, _ = pixels.reset()
    for _ in range(9):  # episodes last 4 steps
        drawn = symbolic.pictures()
        assert drawn is not None and torch.equal(drawn, seen)
        actions = torch.full((FULL,), 3)
        symbolic.step(actions)
        seen = pixels.step(actions)[0]
    assert torch.equal(symbolic.images(drawn), pixels.unpack(drawn))

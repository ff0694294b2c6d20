"""Craftax's vector environments: upstream's rules exactly, in worlds that only the seed decides."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checker import actions_of, assert_same, check_vector_env, copied, play
from conftest import FEW, FULL

import envs
from dynmoe.errors import UserError
from envs import craftax_game
from envs.craftax import NAMES, CraftaxVectorEnv, _key

ROOT = Path(__file__).parents[3]
CLASSIC, CRAFTAX = "Craftax-Classic-Pixels-v1", "Craftax-Pixels-v1"


def make(name: str, seed: int = 0, **settings: Any) -> CraftaxVectorEnv:
    settings = {"num_envs": FEW if "Classic" in name else FULL, **settings}
    return envs.make(name, seed=seed, **settings)  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    """Episodes of 9 steps, so that many end, each at its own time for Classic's deaths."""
    ends = check_vector_env(lambda seed: make(name, seed, max_timesteps=9))
    assert ends >= 60 // 9 * (FEW if "Classic" in name else FULL)


@pytest.mark.parametrize("observation", ["pixels", "pixels-float"])
def test_contract_of_frames(observation: str) -> None:
    check_vector_env(lambda seed: make(CLASSIC, seed, observation=observation, max_timesteps=9))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (CLASSIC, (17, 22, 1, 22.0, 10_000, (3, 63, 63))),
        (CRAFTAX, (43, 67, 9, 226.0, 100_000, (3, 130, 110))),
        ("Craftax-Classic-Symbolic-v1", (17, 22, 1, 22.0, 10_000, (1345,))),
        ("Craftax-Symbolic-v1", (43, 67, 9, 226.0, 100_000, (8268,))),
    ],
)
def test_facts(name: str, facts: tuple[Any, ...]) -> None:
    env = make(name)
    assert facts == (env.num_actions, len(env.achievements), env.num_floors, env.max_return,
                     env.max_timesteps, env.input_shape)  # fmt: skip
    assert env.achievements[0] == "collect_wood" and "wake_up" in env.achievements
    assert str(env).startswith(f"CraftaxVectorEnv({name!r}, {env.num_envs}, device='cpu'")


def upstream(env: CraftaxVectorEnv, seed: int, game: Any) -> tuple[Any, Any]:
    """Worlds of the first episodes by upstream's own functions, its step and our keys of a step.

    Compiled one environment at a time and with the compiler's usual options.
    """
    import jax

    fold, first = jax.random.fold_in, env.part[0] * env.num_envs
    world, chance = _key(seed, "worlds"), _key(seed, "steps")
    states = [game.reset(fold(fold(world, 0), first + i))[1] for i in range(env.num_envs)]
    return states, lambda t, i: fold(fold(chance, t), first + i)


def test_rules_are_upstreams() -> None:
    """Every array of the state, bit for bit, and observation, reward and end.

    Of all environments, and of the second half of twice as many.
    """
    from craftax.craftax_classic.envs import craftax_symbolic_env

    game = craftax_symbolic_env.CraftaxClassicSymbolicEnvNoAutoReset()
    for part, steps in (((0, 1), 40), ((1, 2), 20)):
        name = "Craftax-Classic-Symbolic-v1"
        check_rules(make(name, num_envs=part[1] * FEW, part=part), game, steps)


def check_rules(env: CraftaxVectorEnv, game: Any, steps: int) -> None:
    seen, _ = env.reset(seed=5)
    states, key_of = upstream(env, 5, game)
    for t, actions in enumerate(actions_of(env, steps)):
        for i, state in enumerate(states):
            assert np.array_equal(game.get_obs(state), seen[i].numpy())
        seen, reward, terminated, truncated, info = env.step(actions)
        state_of = env.state_dict()["state"]
        for i, action in enumerate(actions.tolist()):
            _, states[i], gain, done, _ = game.step(key_of(t, i), states[i], action)
            assert (float(gain), bool(done)) == (float(reward[i]), bool(terminated[i]))
            for name, value in craftax_game.by_name(states[i]).items():
                assert np.array_equal(np.asarray(value), state_of[name][i].numpy()), name
            assert np.array_equal(states[i].achievements, info["achievements"][i].numpy())
        assert not truncated.any()


@pytest.mark.slow
def test_one_environment_is_the_first_of_many() -> None:
    """Over several episodes, whose worlds come from blocks of another size."""
    few, one = make(CLASSIC, max_timesteps=30), make(CLASSIC, max_timesteps=30, num_envs=1)
    assert torch.equal(few.reset(seed=7)[0][:1], one.reset(seed=7)[0])
    ends = 0
    for actions in actions_of(few, 130):
        many, single = few.step(actions), one.step(actions[:1])
        for a, b in zip(many[:4], single[:4], strict=True):
            assert torch.equal(a[:1], b)
        assert_same({k: v[:1] for k, v in many[4]["episode"].items()}, single[4]["episode"])
        ends += int(single[4]["_episode"])
    assert ends >= 4


def test_worlds_depend_on_environment_and_episode_alone() -> None:
    """Whichever episodes of the others ended before, and in whichever block a world was made."""
    env = make(CLASSIC)
    worlds = [env.reset(seed=2)[0], env.reset()[0], env.reset()[0]]
    flat = torch.cat(worlds)
    assert len(flat.unique(dim=0)) == 3 * FEW
    env.reset(seed=2)
    env.step(torch.zeros(FEW, dtype=torch.long))
    for k in (1, 2):  # end one episode after another, the last environment's first
        for i in reversed(range(FEW)):
            kill(env, i)
            observations, _, terminated, _, _ = env.step(torch.zeros(FEW, dtype=torch.long))
            assert terminated.nonzero().tolist() == [[i]]
            assert torch.equal(observations[i], worlds[k][i])


def kill(env: CraftaxVectorEnv, i: int, **fields: float) -> None:
    """Let environment i die, or have other fields, in the coming step; not in an episode's first,
    which begins in its world."""
    state = env.state_dict()
    for name, value in (fields or {"player_health": 0}).items():
        state["state"][name][i] = value
    env.load_state_dict(state)


def test_death_and_cut_are_told_apart() -> None:
    env = make(CLASSIC, max_timesteps=5)
    env.reset(seed=0)
    nothing = torch.zeros(FEW, dtype=torch.long)
    for t in range(1, 5):
        _, _, terminated, truncated, info = env.step(nothing)
        assert not (terminated | truncated).any() and info["episode"]["l"].tolist() == [t] * FEW
    kill(env, 1)  # dies in the step that would have been its last
    observations, _, terminated, truncated, info = env.step(nothing)
    assert terminated.tolist() == [i == 1 for i in range(FEW)]
    assert truncated.tolist() == [i != 1 for i in range(FEW)]
    assert info["episode"]["l"].tolist() == [5] * FEW
    assert not (info["final_obs"] == observations).all(dim=1).any()
    _, _, terminated, truncated, info = env.step(nothing)
    assert info["episode"]["l"].tolist() == [1] * FEW and not (terminated | truncated).any()


def test_statistics_and_achievements_start_again() -> None:
    env = make(CLASSIC)
    env.reset(seed=0)
    nothing = torch.zeros(FEW, dtype=torch.long)
    env.step(nothing)
    kill(env, 2, **{"inventory.sapling": 1})
    info = env.step(torch.full((FEW,), 10))[4]  # place the sapling
    placed = env.achievements.index("place_plant")
    assert info["achievements"][:, placed].tolist() == [i == 2 for i in range(FEW)]
    assert info["episode"]["r"].tolist() == [float(i == 2) for i in range(FEW)]
    kill(env, 2)
    info = env.step(nothing)[4]
    assert info["_episode"].tolist() == [i == 2 for i in range(FEW)]
    assert info["achievements"][2, placed] and info["episode"]["r"][2] == 1
    info = env.step(nothing)[4]
    assert not info["achievements"][2].any() and info["episode"]["r"][2] == 0


@pytest.mark.slow  # the full game, which takes a minute to compile
def test_floors() -> None:
    """The present floor and the deepest of the episode; a new episode begins on floor 0."""
    env = make(CRAFTAX)
    env.reset(seed=0)
    nothing = torch.zeros(FULL, dtype=torch.long)
    env.step(nothing)
    for floor, deepest in ((3, 3), (1, 3), (4, 4)):
        kill(env, 1, player_level=floor)
        info = env.step(nothing)[4]
        assert info["floor"].tolist() == [0, floor]
        assert info["episode"]["deepest"].tolist() == [0, deepest]
    kill(env, 1)
    _, _, terminated, _, info = env.step(nothing)
    assert terminated.tolist() == [False, True]
    assert info["floor"].tolist() == [0, 0] and info["episode"]["deepest"].tolist() == [0, 4]
    assert env.step(nothing)[4]["episode"]["deepest"].tolist() == [0, 0]


@pytest.mark.parametrize(("name", "steps"), [(CLASSIC, 50), (CRAFTAX, 12)])
@pytest.mark.parametrize("at", [7, 9])
def test_state_is_restored_exactly(name: str, steps: int, at: int) -> None:
    """In midst of episodes, and just where all of them ended."""
    env = make(name, max_timesteps=9)
    env.reset(seed=1)
    play(env, actions_of(env, at))
    file = io.BytesIO()
    saved = env.state_dict()
    kept = copied(saved)
    torch.save(saved, file)
    observations = env._frames(env._look())
    expected = play(env, actions_of(env, steps, seed=1))
    expected += [copied(env.reset())]
    file.seek(0)
    other = make(name, seed=9, max_timesteps=9)
    if at == 9:
        other.reset()
        play(other, actions_of(env, 3))
        observations = make_second_worlds(name)
    state = torch.load(file, weights_only=True)
    assert torch.equal(other.load_state_dict(state), observations)
    got = play(other, actions_of(env, steps, seed=1))
    assert_same([*got, copied(other.reset())], expected)
    other.load_state_dict(saved)
    play(other, actions_of(env, 2))
    assert_same(saved, kept)


def make_second_worlds(name: str) -> torch.Tensor:
    """First observations of all second episodes."""
    env = make(name, max_timesteps=9)
    env.reset(seed=1)
    return env.reset()[0]


def test_a_state_of_other_environments_is_refused() -> None:
    env = make(CLASSIC)
    env.reset()
    state = env.state_dict()
    for name, value in (("num_envs", 8), ("name", CRAFTAX), ("max_timesteps", 3)):
        with pytest.raises(UserError, match=name):
            env.load_state_dict(state | {name: value})
    del state["state"]["map"]
    with pytest.raises(UserError, match="version of craftax"):
        env.load_state_dict(state)


def test_writing_into_what_was_returned_harms_nothing() -> None:
    """Tensors share memory with JAX's arrays, but with none that is used again."""
    streams = []
    for spoil in (False, True):
        env = make(CLASSIC, max_timesteps=9)
        stream = [copied(first := env.reset(seed=4))]
        for actions in actions_of(env, 40):
            returned = env.step(actions)
            stream.append(copied(returned))
            if spoil:
                *tensors, info = returned
                tensors += [first[0], info["final_obs"], info["achievements"], info["floor"]]
                for tensor in (*tensors, *info["episode"].values(), actions):
                    tensor.fill_(1)
        streams.append(stream)
    assert_same(streams[0], streams[1])


def test_what_was_returned_does_not_change_later() -> None:
    env = make(CLASSIC, max_timesteps=9)
    kept = [env.reset(seed=4), *(env.step(actions) for actions in actions_of(env, 20))]
    copies = copied(kept)
    play(env, actions_of(env, 30))
    assert_same(copied(kept), copies)


def test_through_the_host() -> None:
    """As where torch is on another kind of device than JAX."""
    streams = []
    for shares in (True, False):
        env = make(CLASSIC, max_timesteps=9)
        env._shares = shares
        streams.append([copied(env.reset(seed=4)), *play(env, actions_of(env, 20))])
    assert_same(streams[0], streams[1])


@pytest.mark.thin(1)
@pytest.mark.parametrize("observation", ["pixels", "pixels-float"])
def test_renderers_agree(observation: str) -> None:
    ours, theirs = (make(CLASSIC, renderer=renderer, observation=observation, max_timesteps=9)
                    for renderer in ("fast", "upstream"))  # fmt: skip
    codes = make(CLASSIC, max_timesteps=9)
    error = 1 if observation == "pixels" else 1e-6
    for env in (ours, theirs, codes):
        env.reset(seed=6)
    for actions in actions_of(codes, 20):
        a, b, c = (env.step(actions) for env in (ours, theirs, codes))
        assert (a[0].float() - b[0].float()).abs().max() <= error
        assert (a[4]["final_obs"].float() - b[4]["final_obs"].float()).abs().max() <= error
        frames = [
            env.unpack(x[0]).float()
            for env, x in zip((ours, theirs, codes), (a, b, c), strict=True)
        ]
        for other in frames[1:]:  # apart by one where a value lies between two whole numbers
            difference = (frames[0] - other).abs()
            assert difference.max() <= 1 and difference.mean() < 0.01
        assert frames[0].std() > 10


def test_misuse() -> None:
    env = make(CLASSIC)
    right = torch.zeros(FEW, dtype=torch.long)
    for call in (lambda: env.step(right), env.state_dict):
        with pytest.raises(RuntimeError, match="reset"):
            call()
    env.reset()
    for wrong in (right[1:], right.float(), right[:, None], right + 17, right - 1):
        with pytest.raises(ValueError, match="actions must be"):
            env.step(wrong)
    for taken in (right.to(torch.int32), right.to(torch.uint8), right + 16):
        env.step(taken)
    env.close()
    assert env.closed
    with pytest.raises(RuntimeError, match="reset"):
        env.step(right)


def test_a_second_process_starts_from_the_cache(own_cache: Path) -> None:
    """It loads no upstream code, says nothing, and gets the same numbers."""
    env = make(CLASSIC, seed=8)
    env.reset()
    reward = env.step(torch.full((FEW,), 5))[0].long().sum()
    code = f"""
import sys, torch, envs
assert not any(name in sys.modules for name in ("jax", "torchvision", "numba"))
env = envs.make({CLASSIC!r}, {FEW}, seed=8)
env.reset()
total = env.step(torch.full(({FEW},), 5))[0].long().sum()
assert total == {reward}, total
assert not [name for name in sys.modules if name.startswith("craftax.")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert any((own_cache / "dynmoe" / "jax").iterdir())

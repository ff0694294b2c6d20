"""Craftax's environment steps beside upstream's bare rules, and what new worlds cost.

    python -m benchmarks.craftax_step [--num-envs 64] [--games classic full] [--rounds 30]

A round is ten steps of N environments at random. "bare" is upstream's step function, vmapped and
jitted with its state donated: no observations, no ends of episodes, no torch. It waits for each
step's rewards, as an agent has to; "unawaited" does not, and runs ten steps ahead. "env" is all
that `env.step` does, with codes, episode statistics and new worlds. The share of new worlds is that
of making them; copying one into place is part of the next step (tens of microseconds).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import envs
from benchmarks.timing import alternate, ratio
from envs import craftax_game

STEPS = 10
"""per round"""


def bare(classic: bool, num_envs: int, wait: bool) -> Callable[[], None]:
    """A round of upstream's rules alone, waiting for each step or for the last."""
    import jax

    game = craftax_game.game(classic)
    keys = jax.random.split(jax.random.PRNGKey(0), num_envs)
    step = jax.jit(jax.vmap(game.step), donate_argnums=1)
    make = jax.jit(jax.vmap(game.make))
    state = [make(keys)]
    generator = np.random.default_rng(0)

    def play() -> None:
        for _ in range(STEPS):
            actions = generator.integers(0, game.facts.num_actions, num_envs, dtype=np.int32)
            state[0], reward = step(keys, state[0], actions)
            if wait:
                reward.block_until_ready()
        reward.block_until_ready()

    return play


def rounds(env: Any) -> Callable[[], None]:
    """A round of an environment."""
    generator = torch.Generator().manual_seed(0)

    def play() -> None:
        for _ in range(STEPS):
            env.step(torch.randint(env.num_actions, (env.num_envs,), generator=generator))

    return play


def reset_share(env: Any, steps: int) -> tuple[float, float, float]:
    """Share of wall and of process time spent on new worlds; mean steps of an episode."""
    spent, ends = np.zeros(2), 0
    enter = env._enter

    def timed(rows: np.ndarray) -> Any:
        nonlocal spent, ends
        began = clocks()
        first = enter(rows)
        spent, ends = spent + clocks() - began, ends + len(rows)
        return first

    env._enter = timed
    play, began = rounds(env), clocks()
    for _ in range(steps // STEPS):
        play()
    wall, process = spent / (clocks() - began)
    env._enter = enter
    return wall, process, steps * env.num_envs / max(ends, 1)


def clocks() -> np.ndarray:
    """Seconds of wall and of process time."""
    return np.array([time.perf_counter(), time.process_time()])


def compare(classic: bool, num_envs: int, number: int, steps: int) -> None:
    """Measure one game and print it."""
    name = f"Craftax-{'Classic-' * classic}Pixels-v1"
    env: Any = envs.make(name, num_envs)
    env.reset(seed=0)
    variants: dict[str, Callable[[], object]] = {
        "bare": bare(classic, num_envs, wait=True),
        "unawaited": bare(classic, num_envs, wait=False),
        "env": rounds(env),
    }
    for _ in range(30):  # past the first steps, when no episode ends
        variants["env"]()
    print(f"{name}, {num_envs} environments")
    for threads, clock in ((1, "process"), (2, "wall")):
        torch.set_num_threads(threads)  # with one thread `alternate` takes process time
        seconds = alternate(variants, number, torch.device("cpu"))
        speed = {k: STEPS * num_envs / statistics.median(v) for k, v in seconds.items()}
        speeds = ", ".join(f"{k} {v:.0f}" for k, v in speed.items())
        ratios = [f"{1 / ratio(seconds, 'env', k):.2f}" for k in ("bare", "unawaited")]
        print(f"  steps per {clock} second: {speeds}; env / bare {' / unawaited '.join(ratios)}")
    wall, process, length = reset_share(env, steps)
    print(
        f"  new worlds: {100 * wall:.1f} % of wall time, {100 * process:.1f} % of process time; "
        f"one per {length:.0f} steps"
    )


def main() -> None:
    """Measure the games asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--games", nargs="+", default=["classic", "full"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1000, help="of random play, for new worlds")
    args = parser.parse_args()
    for game in args.games:
        compare(game == "classic", args.num_envs, args.rounds, args.steps)


if __name__ == "__main__":
    main()

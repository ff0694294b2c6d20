"""Playing with an agent: its episodes, what they say about it, and the best one in full.

Shapes: N environments, T steps of a
rollout, L steps of an episode, A achievements.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agents import ppo
from agents.actor_critic import ActorCritic
from agents.rollout import Episode, Rollout, collect
from agents.statistics import Trace
from dynmoe import seeding
from dynmoe.lab.files import finite
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.statistics import Interval, confidence_interval, iqm
from dynmoe.moe.model import undisturbed
from envs.vector import TorchVectorEnv

CHUNK = 64
"""Steps between two looks at who is still playing; the episodes do not depend on it."""


def play(
    env: TorchVectorEnv,
    policy: ActorCritic,
    seed: int,
    max_steps: int = 10_000,
    uniform: bool = False,
    autocast: str = "none",
    observations: bool = False,
    progress: ProgressLine | None = None,
) -> tuple[list[Episode], int, Trace | None]:
    """One episode in each of N environments, with actions drawn from the policy.

    It is each environment's first: the first N to end anywhere would be the short ones. Those not
    over after `max_steps` are left out, which favours short ones as well, so they are counted.
    The environments are reset before, and stand anywhere afterwards; the policy is left as it was.
    The same environments, policy and seed play the same episodes.

    Args:
        env, policy: where, and who.
        seed: of the episodes and the actions.
        max_steps: steps after which to give up.
        uniform: every action equally often, whatever the policy says.
        autocast: "none", or "bf16" as it may have been trained.
        observations: keep the best episode's pictures (for a video).
        progress: told the steps done and episodes over.

    Returns:
        The episodes in the order of their environments, `step` counted from the reset; the number
        left out; and the trace of the one that saw most floors, of those the deepest, of those the
        longest (None if no episode ended).
    """
    seen, info = env.reset(seed=seeding.derive(seed, "evaluate"))
    floors, played = info["floor"], 0
    generator = seeding.generator(seed, "evaluate", "actions", device=env.device)
    film = _Film(env.num_envs)
    with undisturbed(policy), ppo.autocast(env.device, autocast):
        while film.playing and played < max_steps:
            steps = min(CHUNK, max_steps - played)
            drawn: list[Tensor] | None = [] if observations else None
            rollout = collect(env, policy, seen, floors, steps, 1.0, generator, uniform, drawn)
            seen, floors = rollout.next_observations, rollout.next_floors
            film.add(rollout, played, drawn)
            played += steps
            if progress is not None and (not film.playing or progress.due(played)):
                progress.update(played, episodes=f"{len(film.episodes)}/{env.num_envs}")
    episodes = [film.episodes[i] for i in sorted(film.episodes)]
    return episodes, env.num_envs - len(episodes), film.best


class _Film:
    """First episodes as they are played: the steps of those not over yet, and the best of all."""

    def __init__(self, num_envs: int) -> None:
        self.playing: dict[int, list[dict[str, Tensor]]] = {i: [] for i in range(num_envs)}
        self.episodes: dict[int, Episode] = {}
        self.rank = (-1, -1, -1)
        self.best: Trace | None = None

    def add(self, rollout: Rollout, before: int, pictures: list[Tensor] | None) -> None:
        """Take a rollout that began `before` steps after the reset, and its packed pictures."""
        steps = {"floors": rollout.floors.cpu()}
        steps |= {f"gates.{name}": gates.cpu() for name, gates in rollout.gates.items()}
        if pictures is not None:
            steps["observations"] = torch.stack(pictures).cpu()
        for i, parts in self.playing.items():
            parts.append({name: tensor[:, i].clone() for name, tensor in steps.items()})
        for episode in rollout.episodes:
            if episode.env in self.playing:
                parts = self.playing.pop(episode.env)
                self.episodes[episode.env] = replace(episode, step=before + episode.step)
                trace = _trace(episode, parts)
                rank = (len(trace.floors.unique()), episode.deepest, episode.length)
                if rank > self.rank:
                    self.rank, self.best = rank, trace


def _trace(episode: Episode, parts: list[dict[str, Tensor]]) -> Trace:
    """An episode from the steps since the reset."""
    whole = {name: torch.cat([p[name] for p in parts])[: episode.length] for name in parts[0]}
    floors, seen = whole.pop("floors"), whole.pop("observations", None)
    gates = {name.removeprefix("gates."): tensor for name, tensor in whole.items()}
    return Trace(episode.episode_return, episode.deepest, floors, gates, seen)


def evaluation_summary(
    env: TorchVectorEnv, episodes: list[Episode], unfinished: int
) -> dict[str, Any]:
    """What episodes say about who played them, as plain values for JSON.

    Returns:
        episodes, unfinished: how many.
        return_mean, return_low, return_high: mean and its 95 % t interval over episodes.
        return_iqm: interquartile mean.
        percent_of_max: the mean in percent of the most an episode can return.
        length_mean: steps.
        deepest_max, deepest_mean: deepest floor of an episode.
        achievements: name -> share of episodes that unlocked it, 0..1.
        None stands for what is not known: without episodes all means; with one the interval; in an
        environment that has no most the percentage.
    """
    returns = [episode.episode_return for episode in episodes]
    deepest = [episode.deepest for episode in episodes]
    unknown = Interval(math.nan, math.nan, math.nan)
    interval = confidence_interval(returns, "mean") if returns else unknown
    unlocked = [index for episode in episodes for index in episode.achievements]
    summary: dict[str, Any] = {
        "episodes": len(episodes),
        "unfinished": unfinished,
        "return_mean": interval.point,
        "return_low": interval.low,
        "return_high": interval.high,
        "return_iqm": iqm(returns) if returns else None,
        "percent_of_max": 100 * interval.point / env.max_return if env.max_return else None,
        "length_mean": _mean([episode.length for episode in episodes]),
        "deepest_max": max(deepest, default=None),
        "deepest_mean": _mean(deepest),
        "achievements": {
            name: unlocked.count(index) / len(episodes) if episodes else None
            for index, name in enumerate(env.achievements)
        },
    }
    return finite(summary)


def print_evaluation(summary: dict[str, Any], title: str) -> None:
    """A table of `evaluation_summary`; achievements by rate, those never unlocked as a number."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    left_out = f" ({summary['unfinished']} unfinished left out)" if summary["unfinished"] else ""
    table.add_row("episodes", f"{summary['episodes']}{left_out}")
    if summary["episodes"]:
        _add_means(table, summary)
        table.add_section()
        _add_achievements(table, summary["achievements"])
    Console(markup=False, emoji=False).print(table)


def print_achievements(rates: dict[str, float], title: str) -> None:
    """A table of how many episodes unlocked each, 0..1; those never unlocked as a number."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    _add_achievements(table, rates)
    Console(markup=False, emoji=False).print(table)


def _add_achievements(table: Table, rates: dict[str, float]) -> None:
    """Rows by rate."""
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        if rate:
            table.add_row(name, f"{100 * rate:.1f} %")
    never = sum(not rate for rate in rates.values())
    if never:
        table.add_row(f"{never} other achievement{'s' * (never > 1)}", "never")


def _add_means(table: Table, summary: dict[str, Any]) -> None:
    """Rows of what at least one episode tells."""
    low, high = summary["return_low"], summary["return_high"]
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    table.add_row(
        "mean return [95 % interval]" if ends else "mean return",
        f"{summary['return_mean']:.2f}{ends}",
    )
    table.add_row("interquartile mean", f"{summary['return_iqm']:.2f}")
    if summary["percent_of_max"] is not None:
        table.add_row("share of the most possible return", f"{summary['percent_of_max']:.1f} %")
    table.add_row("mean length", f"{summary['length_mean']:.1f} steps")
    table.add_row("deepest floor", f"{summary['deepest_max']} (mean {summary['deepest_mean']:.2f})")


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None

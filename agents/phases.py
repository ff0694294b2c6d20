"""Shifts in an agent's training: when they come, what it returns on each phase, what they cost.

A shift is a new phase of an environment that tells its phases (Craftax-Phases-v1), or the first
arrival of more than half of the environments on a deeper floor (Stages-v0, Craftax).

Shapes: T steps of a rollout, N environments, K phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents import ppo
from agents.actor_critic import ActorCritic
from agents.rollout import Rollout, collect
from dynmoe import seeding
from dynmoe.lab import processes
from dynmoe.moe.diagnostics import gate_shares, most_experts
from dynmoe.moe.local_routing import (
    experts_used,
    segment_cache_hit_rate,
    segment_routing_performance,
)
from dynmoe.moe.model import undisturbed
from envs.vector import TorchVectorEnv

ARRIVED = 0.5
"""a floor counts once more than this share of the environments was there within a rollout"""
PLAYED = 128
"""steps of an episode that count, where an agent is asked for its return on a phase"""
CHUNK = 32
"""steps that are played at a time; bounds memory"""
SEGMENT = 8
"""steps of a segment, of which local routing consistency tells"""
RECOVERED = 0.9
"""share of a phase's final level at which a return counts as recovered"""
METRICS: dict[str, str] = {
    "phase_return": "return at the end of a phase, mean over phases",
    "recovery": f"steps from a shift until the return is at {100 * RECOVERED:.0f} % of the level "
    "that the phase ends with, mean over shifts",
    "earlier_return": "return on all phases but the last, played at the end of training",
    "forgetting": "return that all phases but the last have lost since the best played before",
    "last_stage": "steps until the last stage was reached, or all",
    "newest_at_first": "newest expert's gate share on the newest floor, just after its growth",
    "newest_on_new": "newest expert's gate share on the newest floor when it grew, at the end",
    "newest_on_old": "newest expert's gate share on the floors before that, at the end",
    "floor_information": "share of what experts could tell of the floor",
    "segment_routing": f"SRP of the top expert over segments of {SEGMENT} steps",
    "segment_cache": f"SCH with one expert in the cache, segments of {SEGMENT} steps",
}
"""Numbers of a run's summary -> what they are; see `figure`."""


class Shifts:
    """Counts the shifts of a run.

    Args:
        first: stage that training begins in.

    Attributes:
        begun: [stage, environment steps at which it began] of all shifts; the first began at 0.
    """

    def __init__(self, first: int = 0) -> None:
        self.begun: list[list[int]] = [[first, 0]]

    def see(self, steps: int, rollout: Rollout, phase: int | None, num_floors: int) -> int | None:
        """The stage that has begun since the rollout before, if one has.

        Args:
            steps: environment steps at the end of the rollout.
            phase: that the environment tells, or None.
            num_floors: floors that it tells apart.
        """
        stage = phase
        if stage is None:
            there = [(rollout.floors == floor).any(dim=0) for floor in range(num_floors)]
            shares = [float(each.float().mean()) for each in there]
            stage = max((f for f, share in enumerate(shares) if share > ARRIVED), default=0)
        if stage <= self.begun[-1][0]:
            return None
        self.begun.append([stage, steps])
        return stage


def returns_on_phases(
    env: TorchVectorEnv, policy: ActorCritic, phases: int, seed: int, autocast: str = "none"
) -> tuple[list[float], list[float]]:
    """[phases] mean returns of the first episodes of N environments on each of the first phases.

    Only the first 128 steps of an episode count, so that none is left out. Training goes on as if
    nothing had been played. Also [phases] the newest expert's gate share while playing, the mean
    over MoE layers; nan without any.
    """
    found: list[tuple[float, float]] = []
    for phase in range(phases):
        own = processes.in_turn(partial(env.on_phase, phase))
        with undisturbed(policy), ppo.autocast(env.device, autocast):
            found.append(_first_returns(own, policy, seeding.derive(seed, "phase", phase)))
        own.close()
    return [value for value, _ in found], [share for _, share in found]


def _first_returns(env: TorchVectorEnv, policy: ActorCritic, seed: int) -> tuple[float, float]:
    """Mean over the environments of their first episodes' rewards, of at most PLAYED steps.

    And the newest expert's share in all that was played.
    """
    shares: list[float] = []
    newest = most_experts(policy) - 1
    seen, info = env.reset(seed=seed)
    floors, generator = info["floor"], seeding.generator(seed, "actions", device=env.device)
    playing = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    total = torch.zeros(env.num_envs, device=env.device)
    for _ in range(PLAYED // CHUNK):
        rollout = collect(env, policy, seen, floors, CHUNK, 0.0, generator)
        seen, floors = rollout.next_observations, rollout.next_floors
        for gates in rollout.gates.values():
            shares.append(float(gate_shares(gates.flatten(0, 1))[:, newest].mean()))
        for reward, done in zip(rollout.rewards, rollout.dones, strict=True):
            total += reward * playing
            playing &= ~done
        if not bool(playing.any()):
            break
    return float(total.mean()), _mean(shares)


def consistency(gates: dict[str, Tensor], experts: int) -> dict[str, float]:
    """Local routing consistency of an episode, by tag: SRP and SCH of each layer's top expert.

    Args:
        gates: MoE layer -> [L, M] gates.
        experts: living ones; nothing is told of one alone.
    """
    values: dict[str, float] = {}
    if experts < 2:
        return values
    for name, each in gates.items():
        used = experts_used(each[:, :experts], 1)
        segment = min(SEGMENT, len(used))
        if bool(used.any()):
            values[f"router/segment_routing/{name}"] = segment_routing_performance(used, segment)
            values[f"router/segment_cache/{name}"] = segment_cache_hit_rate(used, segment, 1)
    return values


def figure(summary: dict[str, Any], metric: str) -> float:
    """A number of METRICS; nan where a run does not have it."""
    return _FIGURES[metric](summary)


def levels(summary: dict[str, Any]) -> list[tuple[list[list[float]], float]]:
    """Of each phase: its points (steps since it began, return), and the level that it ends with.

    The level is the mean over the last quarter of the phase's points. A point that the shift itself
    is in counts to the phase before.
    """
    begun = [steps for _, steps in summary["shifts"]]
    ends = [*begun[1:], math.inf]
    found = []
    for start, end in zip(begun, ends, strict=True):
        points = [
            [steps - start, value]
            for steps, value in summary["curve"]
            if start < steps <= end and value is not None
        ]
        last = points[-max(1, len(points) // 4) :]
        found.append((points, sum(v for _, v in last) / len(last) if last else math.nan))
    return found


def _phase_return(summary: dict[str, Any]) -> float:
    return _mean([level for _, level in levels(summary)])


def _recovery(summary: dict[str, Any]) -> float:
    steps = []
    for points, level in levels(summary)[1:]:
        enough = level - (1 - RECOVERED) * abs(level)
        steps += [next((float(s) for s, value in points if value >= enough), math.nan)]
    return _mean(steps)


def _earlier_return(summary: dict[str, Any]) -> float:
    played = summary["phase_returns"]
    return _mean(played[-1][1][:-1]) if played else math.nan


def _forgetting(summary: dict[str, Any]) -> float:
    played = summary["phase_returns"]
    if not played:
        return math.nan
    last = played[-1][1]
    lost = []
    for phase in range(len(last) - 1):
        before = [returns[phase] for _, returns in played[:-1] if phase < len(returns)]
        lost += [max(before) - last[phase]] if before else []
    return _mean(lost)


def _last_stage(summary: dict[str, Any]) -> float:
    last = len(summary["stage_floors"]) - 1
    reached = [steps for stage, steps in summary["shifts"] if stage == last]
    return float(reached[0] if reached else summary["env_steps"])


def _newest(summary: dict[str, Any], new: bool, at: int = -1) -> float:
    """On the stage that had begun when the latest expert came, or on those before it."""
    came = summary["growth"][-1]["step"] if summary["growth"] else math.inf
    shares = [found for steps, found in summary["newest_shares"] if steps > came]
    if not shares:
        return math.nan
    stage = [stage for stage, steps in summary["shifts"] if steps <= came][-1]
    floor = summary["stage_floors"][stage]
    seen = [share for f, share in shares[at] if (f == floor if new else f < floor)]
    if not seen and at == -1 and summary["played_shares"]:  # nobody is there any more: play
        played = summary["played_shares"][-1]
        seen = [played[stage]] if new else played[:stage]
    return _mean(seen)


def _routing(summary: dict[str, Any], name: str) -> float:
    found = [value for tag, value in summary["routing"].items() if tag.startswith(f"{name}/")]
    return _mean(found)


def _mean(values: list[float]) -> float:
    """nan where there is none, or where one is nan."""
    return sum(values) / len(values) if values else math.nan


_FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "phase_return": _phase_return,
    "recovery": _recovery,
    "earlier_return": _earlier_return,
    "forgetting": _forgetting,
    "last_stage": _last_stage,
    "newest_at_first": lambda summary: _newest(summary, True, at=0),
    "newest_on_new": lambda summary: _newest(summary, True),
    "newest_on_old": lambda summary: _newest(summary, False),
    "floor_information": lambda summary: _routing(summary, "router/floor_information_share"),
    "segment_routing": lambda summary: _routing(summary, "router/segment_routing"),
    "segment_cache": lambda summary: _routing(summary, "router/segment_cache"),
}

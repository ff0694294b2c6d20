"""Rollouts: what an agent saw, did and got, and how good that was.

Shapes: T steps, N environments, M experts a layer can hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agents.actions import ActionDistribution
from agents.actor_critic import ActorCritic, acting
from dynmoe.errors import NumericError
from dynmoe.lab import processes
from dynmoe.moe import moe_layers
from envs.vector import TorchVectorEnv


@dataclass(frozen=True)
class Episode:
    """One finished episode."""

    env: int
    """index of its environment, among all"""
    step: int
    """step of the rollout, 0..T-1, with which it ended"""
    episode_return: float
    length: int
    deepest: int
    """deepest floor reached"""
    achievements: list[int]
    """indices of what it unlocked"""


@dataclass
class Rollout:
    """T steps of N environments."""

    observations: Tensor
    """[T, N, ...] packed, as the environment gave them"""
    actions: Tensor
    """[T, N] int64 where they are Discrete, else [T, N, ...] int64 or float32; not clipped"""
    log_probs: Tensor
    """[T, N] log pi(a|s) when acting, nats"""
    values: Tensor
    """[T, N] the critic's V(s)"""
    rewards: Tensor
    """[T, N]; where an episode was cut off (truncated), plus gamma V(its last observation)"""
    dones: Tensor
    """[T, N] bool, the episode ended with this step"""
    last_value: Tensor
    """[N] V of the observations after the last step"""
    next_observations: Tensor
    """[N, ...] those observations"""
    floors: Tensor
    """[T, N] int64, floor on which each observation was made"""
    next_floors: Tensor
    """[N] int64, floor on which `next_observations` were made"""
    gates: dict[str, Tensor]
    """MoE layer name -> [T, N, M] gates when acting"""
    episodes: list[Episode] = field(default_factory=list)
    """those that ended, in order"""
    masks: Tensor | None = None
    """[T, N, P] bool, the options that were allowed; None where the environment tells of none"""


@torch.no_grad()
def collect(
    env: TorchVectorEnv,
    policy: ActorCritic,
    observations: Tensor,
    floors: Tensor,
    steps: int,
    gamma: float,
    generator: torch.Generator,
    uniform: bool = False,
    pictures: list[Tensor] | None = None,
) -> Rollout:
    """Act for `steps` steps from `observations` [N, ...], made on `floors` [N].

    The policy acts as it is evaluated, and nothing of it moves.

    Args:
        gamma: discount, for the value of what a truncated episode still had to come.
        generator: draws the actions, on the environments' device; those of all environments, where
            `env` is a part of them.
        uniform: every action equally often, whatever the policy says.
        pictures: gets the packed pictures [N, ...] of all states acted in.

    Raises:
        NumericError: the policy's outputs are not finite, or what the environments give.
    """
    out = _empty(env, policy, observations, floors, steps)
    distribution, layers = policy.distribution, list(moe_layers(policy))
    with acting(policy):
        for t in range(steps):
            parameters, values = policy(env.unpack(observations))
            if not _finite(parameters, values):
                raise NumericError("the policy's outputs are not finite: a smaller --lr may help")
            if (allowed := env.action_mask) is not None:
                _keep_mask(out, t, allowed)
            if uniform:
                actions, log_probs = _at_random(env, distribution, parameters, generator)
            else:
                parameters = distribution.masked(parameters, allowed)
                actions = distribution.sample(_among_all(env, parameters), generator)[env.rows]
                log_probs = distribution.log_prob(parameters, actions)
            out.observations[t], out.floors[t] = observations, floors
            out.actions[t], out.values[t], out.log_probs[t] = actions, values, log_probs
            for name, layer in layers:
                assert layer.last_routing is not None  # the policy ran just now
                out.gates[name][t] = layer.last_routing.gates
            if pictures is not None:
                drawn = env.pictures()
                pictures.append(out.observations[t] if drawn is None else drawn)
            observations, rewards, terminated, truncated, info = env.step(out.actions[t])
            out.rewards[t], out.dones[t] = rewards, terminated | truncated
            cut_off = truncated & ~terminated  # gymnasium's time limit may say both
            if bool(cut_off.any()):
                last = info["final_obs"][cut_off]
                out.rewards[t, cut_off] += gamma * policy(env.unpack(last))[1]
            out.episodes += _finished(info, t, env.first)
            floors = info["floor"]
        out.next_observations, out.next_floors = observations, floors
        out.last_value = policy(env.unpack(observations))[1]
    return out


def of_all(env: TorchVectorEnv, own: Rollout) -> Rollout:
    """The rollout of all environments, of those of their parts, one on each process."""
    if env.part[1] == 1:
        return own
    whole: dict[str, Any] = {}
    for name, value in vars(own).items():
        if isinstance(value, Tensor):
            axis = 0 if name in ("last_value", "next_observations", "next_floors") else 1
            whole[name] = processes.joined_parts(value, axis)
    gates = {name: processes.joined_parts(each, 1) for name, each in own.gates.items()}
    ended = [episode for part in processes.of_all(own.episodes) for episode in part]
    ended.sort(key=lambda episode: (episode.step, episode.env))
    return Rollout(**whole, gates=gates, episodes=ended)


def _at_random(
    env: TorchVectorEnv,
    distribution: ActionDistribution,
    parameters: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Actions [N, ...] whatever the parameters, of those allowed, and log p [N]."""
    allowed = None if env.action_mask is None else _among_all(env, env.action_mask)
    actions, log_probs = distribution.uniform(_among_all(env, parameters), generator, allowed)
    return actions[env.rows], log_probs[env.rows]


def _among_all(env: TorchVectorEnv, values: Tensor) -> Tensor:
    """Values [n, ...] of a part in their rows of all environments [N, ...], zeros elsewhere.

    What is drawn for all of them is then drawn for each as by one process that has them all.
    """
    if env.part[1] == 1:
        return values
    every = values.new_zeros(env.whole, *values.shape[1:])
    every[env.rows] = values
    return every


def _finite(parameters: Tensor, values: Tensor) -> bool:
    """Whether all are finite. Their sum tells it where it is finite itself, with fewer calls."""
    if math.isfinite(float(parameters.sum() + values.sum())):
        return True
    return bool(parameters.isfinite().all() & values.isfinite().all())


def _keep_mask(out: Rollout, step: int, allowed: Tensor) -> None:
    """Write down the options allowed [N, P] at a step."""
    if out.masks is None:
        out.masks = allowed.new_ones(*out.dones.shape, allowed.shape[1])
    out.masks[step] = allowed


def _empty(
    env: TorchVectorEnv, policy: ActorCritic, observations: Tensor, floors: Tensor, steps: int
) -> Rollout:
    """A rollout with room for `steps` steps."""

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(steps, env.num_envs, *shape, dtype=dtype, device=observations.device)

    return Rollout(
        observations=room(*observations.shape[1:], dtype=observations.dtype),
        actions=room(*policy.distribution.shape, dtype=policy.distribution.dtype),
        log_probs=room(),
        values=room(),
        rewards=room(),
        dones=room(dtype=torch.bool),
        last_value=room()[0],
        next_observations=observations,
        floors=room(dtype=torch.long),
        next_floors=floors,
        gates={name: room(layer.max_experts) for name, layer in moe_layers(policy)},
    )


def estimate_advantages(rollout: Rollout, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates [T, N].

    delta_t = r_t + gamma V(s_t+1) - V(s_t), A_t = delta_t + gamma lambda A_t+1, both cut at ends of
    episodes. Source: Schulman et al. 2016 (arXiv 1506.02438), Eqs. 11 and 16.
    """
    alive = (~rollout.dones).float()
    result = torch.empty_like(rollout.rewards)
    following, value = torch.zeros_like(rollout.last_value), rollout.last_value
    for t in range(len(result) - 1, -1, -1):
        delta = rollout.rewards[t] + gamma * value * alive[t] - rollout.values[t]
        following = delta + gamma * lam * alive[t] * following
        result[t], value = following, rollout.values[t]
    return result


def _finished(info: dict[str, Any], step: int, first: int) -> list[Episode]:
    """The episodes that ended in a step, from the environment's info; `first` is its number."""
    if not bool(info["_episode"].any()):
        return []
    ended = info["_episode"].nonzero().flatten().tolist()
    record, unlocked = info["episode"], info["achievements"]
    return [
        Episode(
            env=first + i,
            step=step,
            episode_return=float(record["r"][i]),
            length=int(record["l"][i]),
            deepest=int(record["deepest"][i]),
            achievements=unlocked[i].nonzero().flatten().tolist(),
        )
        for i in ended
    ]

"""Growth inside PPO: what triggers are told, what a growth is measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents.actions import ActionDistribution, Categorical
from agents.ppo import UpdateStats
from agents.rollout import Rollout
from dynmoe.growth import Signals

Outputs = tuple[Tensor, Tensor]
"""The distribution's parameters (logits [B, A] where actions are Discrete), and values [B]."""


FIGURES = {"effective_rank": "actor/rank/effective_rank", "dormant": "actor/dormant/0.1"}
"""Figure of `Signals` -> the tag under which it is logged."""


def signals(
    env_steps: int,
    rollout: Rollout,
    num_floors: int,
    score: float,
    stats: UpdateStats | None = None,
    measured: Mapping[str, float] | None = None,
    first: int = 0,
    phases: tuple[int, int] | None = None,
) -> Signals:
    """What triggers may look at after a rollout.

    `reached` counts the environments that were on a floor at any step of the rollout, from the
    floor that episodes begin on (`first`). Where there are `phases` (the one that the rollout's
    last step was made in, how many) it counts these. `stats` are those of the update with it.
    `measured` is what was logged with it of the actor's network.
    """
    measured = measured or {}
    figures: dict[str, Any] = {name: measured.get(tag, math.nan) for name, tag in FIGURES.items()}
    figures["loss"] = stats.value_loss if stats else math.nan
    figures["grad_norm"] = stats.grad_norm if stats else math.nan
    if phases is not None and phases[1] > 1:
        reached = [float(phase == phases[0]) for phase in range(phases[1])]
    else:
        there = [(rollout.floors == floor).any(dim=0) for floor in range(first, num_floors)]
        reached = [int(envs.sum()) / len(envs) for envs in there]
    return Signals(step=env_steps, reached=tuple(reached), score=score, **figures)


def policy_shock(
    before: Outputs,
    after: Outputs,
    labels: Tensor | None,
    distribution: ActionDistribution | None = None,
) -> dict[str, float]:
    """How a growth changes what the agent does and expects, on the same observations.

    Both are parameters (logits [B, A], say) and values [B]; `labels` is not looked at.

    Args:
        distribution: over actions; default one choice among A.

    Returns:
        policy_kl: mean KL(policy before || after), nats.
        value_change: root mean square change of the values, in units of return.
    """
    (parameters, values), (new_parameters, new_values) = before, after
    distribution = distribution or Categorical([parameters.shape[1]])
    kl = distribution.divergence(parameters, new_parameters).mean()
    change = (new_values - values).square().mean().sqrt()
    return {"policy_kl": max(float(kl), 0.0), "value_change": float(change)}


def sample(rollout: Rollout, count: int) -> Tensor:
    """Indices [<= count] into the flattened rollout, spread evenly over time and environments."""
    total = rollout.rewards.numel()
    return torch.linspace(0, total - 1, min(count, total)).long()

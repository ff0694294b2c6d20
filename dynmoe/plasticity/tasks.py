"""How a network changes over its tasks: routing, specialisation, and how well it learns them.

Shapes: N samples, E experts, T tasks (or classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynmoe.moe.diagnostics import entropy, gate_shares, label_uncertainty

FLOOR = 1e-12
"""Smallest gate in the drift's denominator; bounds a sample's drift by log 1e12 = 27.6 nats."""


def routing_drift(gates_before: Tensor, gates_after: Tensor) -> float:
    """Mean KL(before || after) of the routing of the same N samples, nats, >= 0 and finite.

    Args:
        gates_before: [N, E].
        gates_after: [N, E'] with E' >= E; experts created in between have share 0 in `before`.

    Raises:
        ValueError: other samples, or fewer experts than before.

    The idea of watching old samples' routing after expansion: StaR-MoE (arXiv 2605.17571). Gates in
    `after` are floored at 1e-12, so that an expert that went silent costs much but not infinity.
    """
    before, after = gate_shares(gates_before), gate_shares(gates_after)
    if len(before) != len(after) or after.shape[1] < before.shape[1]:
        raise ValueError(
            f"drift compares [N, E] with [N, E'], E' >= E; got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )
    before = torch.nn.functional.pad(before, (0, after.shape[1] - before.shape[1]))
    cross = -torch.special.xlogy(before, after.clamp_min(FLOOR)).sum(dim=1)
    # The floor and rounding can push equal rows below 0 by about 1e-12.
    return max(0.0, float((cross - entropy(before)).mean()))


def expert_task_information(mean_gates: Tensor) -> tuple[float, float]:
    """Mutual information of expert and task: `H(mean_t p_t) - mean_t H(p_t)`.

    Args:
        mean_gates: [T, E], row t the mean gate (or histogram of largest gates) p_t on task t, from
            probes of equal size per task. The same with classes as rows tells class specialists.

    Returns:
        The information in nats, within 0..min(log T, log E), and its share in 0..1 of the most it
        could be, min(log T, H(mean_t p_t)). With one task or one used expert both are 0.

    Raises:
        ValueError: not a matrix, or a gate below 0.
    """
    shares = gate_shares(mean_gates)
    marginal = float(entropy(shares.mean(dim=0)))
    information = max(0.0, marginal - float(entropy(shares).mean()))
    most = min(math.log(len(shares)), marginal)
    # Below 1e-12 nats both are rounding, and their ratio means nothing.
    return information, min(1.0, information / most) if most > 1e-12 else 0.0


def information_by_expert(mean_gates: Tensor) -> dict[int, float]:
    """What each expert tells of the task: `H(task) - H(task | expert)`, nats, by expert.

    The information of Zhang et al. 2025 (arXiv 2507.11181), Eq. 16, with tasks for its labels and
    samples weighted by gates, so that dense routers have some, too. It is below 0 for an expert
    whose use is more mixed than the tasks are; experts of zero use are left out. Averaged by the
    experts' loads it is `expert_task_information`.

    Args:
        mean_gates: [T, E], as there: all tasks weigh alike.

    Raises:
        ValueError: not a matrix, or a gate below 0.
    """
    tasks = torch.arange(len(mean_gates))
    whole, own = label_uncertainty(mean_gates, tasks, weighted=True)
    return {expert: whole - h for expert, h in enumerate(own) if not math.isnan(h)}


def plasticity_summary(accuracies: Sequence[float]) -> dict[str, float]:
    """Summarise one accuracy per task, [K] in order of training (each in 0..1).

    Tasks differ in difficulty, so compare with a fresh network's accuracies on the same tasks.

    Returns:
        slope: least-squares slope, accuracy per task; 0 for a single task. Negative = loss.
        last_over_first: ratio of the last task's accuracy to the first's; nan if the first is 0.
        mean: mean over tasks, which is the area under the curve per task.
        min: the worst task's accuracy.

    Raises:
        ValueError: no task, or a value that is not finite (its index is named).

    Source: mean over tasks is the average online (or end-of-task) accuracy of Kumar et al. 2023
    (arXiv 2308.11958); slope and ratio are ours.
    """
    values = np.asarray(accuracies, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected one accuracy per task, got shape {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"accuracy of task {bad[0]} is {values[bad[0]]}")
    centred = np.arange(len(values)) - (len(values) - 1) / 2
    spread = float(centred @ centred)
    return {
        "slope": float(centred @ values) / spread if spread else 0.0,
        "last_over_first": float(values[-1] / values[0]) if values[0] else float("nan"),
        "mean": float(values.mean()),
        "min": float(values.min()),
    }

"""Whether a network learns its later tasks as well as its first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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

"""Grow at task boundaries."""

from __future__ import annotations

from dynmoe.growth.trigger import Signals, Trigger


class TaskTrigger(Trigger, name="task", source="Kim 2025 (arXiv 2511.18987)"):
    """At the start of every task but the first (DynamicMoE's continual learning, 2511.18987)."""

    def fires(self, signals: Signals) -> bool:
        """Whether a task starts."""
        return signals.task_starts

    def planned(self, steps: int, tasks: int) -> int:
        """One growth per task after the first."""
        return tasks - 1

"""When to grow: the trigger contract, the signals of a training loop, and growth by the clock."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dynmoe.errors import UserError, unknown
from dynmoe.registry import Part, PartConfig


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a trigger may look at.

    A figure is None in loops that do not have it, and nan at asks where there is no new value.
    """

    step: int
    """the loop's clock so far: optimizer steps in continual learning, environment steps in
    reinforcement learning"""
    task_starts: bool = False
    """a new task (not the first) begins at this very moment"""
    reached: tuple[float, ...] = ()
    """share of environments that were in each stage (a Craftax floor, or a phase of training) since
    the last ask; the first is the stage where all begin; empty in loops without stages"""
    score: float | None = None
    """figure of merit of late, higher is better: mean episode return in reinforcement learning;
    mean accuracy on the latest 100 minibatches, before they are learnt, in continual learning"""
    loss: float | None = None
    """of the latest training step: the whole training loss in continual learning, the mean value
    loss of the update in reinforcement learning"""
    grad_norm: float | None = None
    """global gradient norm of the latest training step, before clipping"""
    effective_rank: float | None = None
    """of the features that enter the classifier (Roy & Vetterli 2007), on a probe batch"""
    dormant: float | None = None
    """share of dormant units: ReDo score at most 0.1 (arXiv 2302.12902, Eq. 1), on a probe batch"""


class Trigger(Part, ABC, kind="trigger"):
    """Base of all triggers. A loop asks `fires` at each task start and before each update.

    Attributes:
        needs: names of the figures in `Signals` that a loop has to measure for this trigger.
        every: steps between two measurements of those that take a probe batch.
        joined: steps that count as one, see `figures.RowTrigger`.
        state: names of the attributes to resume from; plain values, or dicts of such.

    Raises:
        UserError: a class is defined that needs what `Signals` does not have.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    every: int = 1
    joined: int = 1
    state: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        figures = [f.name for f in fields(Signals) if f.default is None]
        for name in cls.needs:
            if name not in figures:
                raise unknown(f"figure in needs of the trigger {cls.__name__}", name, figures)

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def fires(self, signals: Signals) -> bool:
        """Whether to grow now."""

    @abstractmethod
    def planned(self, steps: int, tasks: int) -> int:
        """Most growths in a run of that many optimizer steps and tasks; sets the layers' size."""

    def without_tasks(self) -> str | None:
        """Why it cannot work where no task start is told, with the way out; None if it can."""
        return None

    def count_rows(self, batch: int) -> None:
        """A loop whose steps are on `batch` rows each says so before it asks or plans."""

    def state_dict(self) -> dict[str, Any]:
        """What to resume from."""
        return {name: copy.copy(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        for name in self.state:
            setattr(self, name, copy.copy(state[name]))


class ClockTrigger(Trigger, ABC):
    """Base of the triggers that go by the loop's clock, however far it moves between two asks."""

    state = ("asked_at",)

    def __init__(self, config: PartConfig) -> None:
        super().__init__(config)
        self.asked_at = 0

    @abstractmethod
    def due(self, before: int, now: int) -> bool:
        """Whether a growth falls after step `before` and no later than step `now`."""

    def fires(self, signals: Signals) -> bool:
        """Whether a growth has fallen due since the last ask; task starts do not count as asks.

        Where the clock is behind the last ask, a new loop has begun it anew.
        """
        self.asked_at = min(self.asked_at, signals.step)
        if signals.task_starts:
            return False
        before, self.asked_at = self.asked_at, signals.step
        return self.due(before, signals.step)


class AtTrigger(ClockTrigger, name="at"):
    """At the given steps of the clock."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the given-steps trigger."""

        steps: tuple[int, ...] = ()
        """steps after which to grow, each at least 1 (optimizer steps in cl, env steps in rl)"""

    def __init__(self, config: Config) -> None:
        if not config.steps or min(config.steps) < 1 or len(set(config.steps)) < len(config.steps):
            raise UserError(
                f"trigger at: steps={list(config.steps)} must be distinct numbers of at least 1, "
                "for example --trigger.steps 500 1000"
            )
        super().__init__(config)
        self.steps = frozenset(config.steps)

    def due(self, before: int, now: int) -> bool:
        """Whether one of the given steps lies in (before, now]; two there are one growth."""
        return any(before < step <= now for step in self.steps)

    def planned(self, steps: int, tasks: int) -> int:
        """How many of the given steps come before the run's last one."""
        return sum(s < steps for s in self.steps)


class EveryTrigger(ClockTrigger, name="every", source="Kim 2025 (arXiv 2511.18987)"):
    """Every n steps of the clock (DynamicMoE's RL: 500M environment steps, 2511.18987)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the clock trigger."""

        steps: int = 1000
        """steps between growths (optimizer steps in cl, env steps in rl)"""

    def __init__(self, config: Config) -> None:
        if config.steps < 1:
            raise UserError(f"trigger every: steps={config.steps} must be at least 1")
        super().__init__(config)
        self.steps = config.steps

    def due(self, before: int, now: int) -> bool:
        """Whether a multiple of n lies in (before, now]."""
        return now // self.steps > before // self.steps

    def planned(self, steps: int, tasks: int) -> int:
        """Multiples of n before the last step: a growth at the very end could learn nothing."""
        return max(0, steps - 1) // self.steps


class TaskTrigger(Trigger, name="task", source="Kim 2025 (arXiv 2511.18987)"):
    """At the start of every task but the first (DynamicMoE's continual learning, 2511.18987)."""

    def fires(self, signals: Signals) -> bool:
        """Whether a task starts."""
        return signals.task_starts

    def planned(self, steps: int, tasks: int) -> int:
        """One growth per task after the first."""
        return tasks - 1

    def without_tasks(self) -> str | None:
        """It waits for task starts."""
        return (
            "trigger task grows at task starts, and none is told here; use drift, adwin, plateau, "
            "gradient, rank, dormancy, every or at"
        )


class StageTrigger(Trigger, name="stage"):
    """At the first arrival in a stage deeper than all before, such as a Craftax floor."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the stage trigger."""

        share: float = 0.0
        """a stage counts once more than this share of the environments is in it between two asks;
        0 for the first environment that gets there"""
        limit: int = 1
        """most growths"""

    state = ("deepest", "growths")

    def __init__(self, config: Config) -> None:
        if not 0 <= config.share < 1 or config.limit < 1:
            raise UserError(
                f"trigger stage: share={config.share} must be in [0, 1) and limit={config.limit} "
                "at least 1"
            )
        super().__init__(config)
        self.share, self.limit = config.share, config.limit
        self.deepest, self.growths = 0, 0

    def fires(self, signals: Signals) -> bool:
        """Whether a new deepest stage has been reached; several at once are one growth.

        Raises:
            UserError: the loop has no stages.
        """
        if len(signals.reached) < 2:
            raise UserError(
                "trigger stage: there are no stages here to arrive in; use another --trigger"
            )
        there = [stage for stage, share in enumerate(signals.reached) if share > self.share]
        if max(there, default=0) <= self.deepest or self.growths == self.limit:
            return False
        self.deepest = max(there)
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit allows."""
        return self.limit

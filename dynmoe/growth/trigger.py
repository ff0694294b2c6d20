"""When to grow: the trigger contract and the signals that a training loop hands to it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from dynmoe.errors import UserError
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
    """share of environments that were in each stage (a Craftax floor) since the last ask; the first
    is the stage where all begin; empty in loops without stages"""
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
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    every: int = 1

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def fires(self, signals: Signals) -> bool:
        """Whether to grow now."""

    @abstractmethod
    def planned(self, steps: int, tasks: int) -> int:
        """Most growths in a run of that many optimizer steps and tasks; sets the layers' size."""

    def state_dict(self) -> dict[str, Any]:
        """State to resume from; none by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        assert not state, state


class ClockTrigger(Trigger, ABC):
    """Base of the triggers that go by the loop's clock, however far it moves between two asks."""

    def __init__(self, config: PartConfig) -> None:
        super().__init__(config)
        self.asked_at = 0

    @abstractmethod
    def due(self, before: int, now: int) -> bool:
        """Whether a growth falls after step `before` and no later than step `now`."""

    def fires(self, signals: Signals) -> bool:
        """Whether a growth has fallen due since the last ask; task starts do not count as asks."""
        if signals.task_starts:
            return False
        before, self.asked_at = self.asked_at, signals.step
        return self.due(before, signals.step)

    def state_dict(self) -> dict[str, Any]:
        """The clock at the last ask."""
        return {"asked_at": self.asked_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.asked_at = state["asked_at"]


class FigureTrigger(Trigger, ABC):
    """Base of the triggers that watch one figure, and wait a while after each growth.

    The figure is looked at from the start, and all that was learnt of it is forgotten at a growth.
    What is seen during the wait counts: a call that lasts is answered when the wait is over.

    Attributes:
        figure: which one, as `Signals` names it.
        memory: what was learnt of it since the last growth; plain values.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every trigger that watches a figure."""

        cooldown: int = 500
        """steps of the clock before the first growth, and between two (optimizer steps in cl, env
        steps in rl)"""
        limit: int = 9
        """most growths"""

    figure: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.needs = frozenset({cls.figure})

    def __init__(self, config: Config) -> None:
        if config.cooldown < 1 or config.limit < 1:
            raise UserError(
                f"trigger {self.name}: cooldown={config.cooldown} and limit={config.limit} must "
                "be at least 1"
            )
        super().__init__(config)
        self.cooldown, self.limit = config.cooldown, config.limit
        self.since, self.growths = 0, 0
        self.memory = self.nothing()

    @abstractmethod
    def nothing(self) -> dict[str, Any]:
        """The memory before any value."""

    @abstractmethod
    def calls(self, value: float) -> bool:
        """Take a new value into the memory; whether it calls for a growth."""

    def fires(self, signals: Signals) -> bool:
        """Whether the figure calls for a growth and the wait is over; task starts bring no values.

        Raises:
            UserError: the loop does not have the figure.
        """
        value = getattr(signals, self.figure)
        if value is None:
            raise UserError(
                f"trigger {self.name}: there is no {self.figure} here to watch; use another "
                "--trigger"
            )
        if signals.task_starts or math.isnan(value) or self.growths == self.limit:
            return False
        if not self.calls(value) or signals.step - self.since < self.cooldown:
            return False
        self.since, self.memory = signals.step, self.nothing()
        self.growths += 1
        return True

    def planned(self, steps: int, tasks: int) -> int:
        """As many as the limit and the clock allow."""
        return min(self.limit, max(0, steps - 1) // self.cooldown)

    def state_dict(self) -> dict[str, Any]:
        """The step of the last growth, the growths made, and the memory."""
        return {"since": self.since, "growths": self.growths, "memory": dict(self.memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.since, self.growths = state["since"], state["growths"]
        self.memory = dict(state["memory"])

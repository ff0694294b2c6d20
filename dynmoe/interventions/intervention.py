"""The kind of part that keeps a network plastic: `--intervention NAME`.

An intervention acts on a network and its optimizer at given moments of a training loop. It knows no
data set and no framework: `InterventionPlugin` calls it from any Avalanche strategy, and PPO calls
it from its own loop. Its hooks do nothing unless a subclass defines them.

    intervention.transform(model, generator)             before the optimizer is made
    intervention.attach(model, optimizer, generator)     once
    intervention.task_starts(task, batches)              at every task but the first
    loss = loss + intervention.penalty()                 before each backward pass
    intervention.gradients_ready()                       between backward pass and optimizer step
    intervention.step_done()                             after each optimizer step
    intervention.grown(before)                           after a growth

To resume: `transform` and `attach` as ever, `rebuild_from(saved)`, then the weights' and the
optimizer's own states, then `load_state_dict(saved)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.interventions.weights import Anchor
from dynmoe.registry import Part, PartConfig


class Limit(Enum):
    """What values an option may have: words for the error message, and the test."""

    AT_LEAST_0 = "at least 0", lambda value: value >= 0
    AT_LEAST_1 = "at least 1", lambda value: value >= 1
    ABOVE_0 = "above 0", lambda value: value > 0
    FINITE = "at least 0", lambda value: 0 <= value < float("inf")
    SHARE = "in 0 .. 1", lambda value: 0 <= value <= 1
    BELOW_1 = "in 0 .. 1", lambda value: 0 <= value < 1
    ABOVE_0_TO_1 = "above 0 and at most 1", lambda value: 0 < value <= 1
    INSIDE_0_1 = "between 0 and 1", lambda value: 0 < value < 1


HOOKS = (
    "transform", "attach", "task_starts", "penalty", "gradients_ready", "step_done", "after_step",
    "grown", "plugin",
)  # fmt: skip
"""Methods of an intervention by which it acts (`begin` alone acts only by hooks of torch's)."""

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives the next task's training batches: inputs [B, ...] and labels [B], on the model's device."""


class Intervention(Part, ABC, kind="intervention"):
    """Base of all interventions. Use one object per training run.

    Attributes:
        model, optimizer, generator: set by `attach`; the generator serves its own draws.
        steps: optimizer steps since then.
        reshapes: it changes what parameters there are in the midst of training.
        by_batch: it looks at batches, so that processes with a part of each would differ.
        limits: option -> what values it may have.

    Raises:
        UserError: an option has another value, or no loop calls what a class defines.
    """

    reshapes: ClassVar[bool] = False
    by_batch: ClassVar[bool] = False
    limits: ClassVar[dict[str, Limit]] = {}
    config: Any
    model: nn.Module
    optimizer: Optimizer
    generator: torch.Generator

    def __init__(self, config: PartConfig) -> None:
        self._check_hooks()
        self.config = config
        self.steps = 0
        for option, limit in self.limits.items():
            (words, holds), value = limit.value, getattr(config, option)
            if not holds(value):
                raise UserError(f"{self.name}: {option}={value} must be {words}")

    @classmethod
    def _check_hooks(cls) -> None:
        """Refuse a class whose methods no loop calls: one with a hook's name misspelt, say."""
        acts = any(getattr(cls, hook) is not getattr(Intervention, hook) for hook in HOOKS)
        own = [n for n in dir(cls) if not n.startswith("_") and callable(getattr(cls, n))]
        strange = [name for name in own if not hasattr(Intervention, name) and name != "Config"]
        if strange and not acts:
            raise UserError(
                f"intervention {cls.name}: no loop calls {', '.join(strange)}, so it would do "
                f"nothing; the hooks are {', '.join(HOOKS)}"
            )

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Change the network's make, in place, before training and before its optimizer exists.

        Raises:
            UserError: the network is unfit; from `begin`, too.
        """

    def attach(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> None:
        """Begin: the network has its first weights. Call once, with the network on its device."""
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.begin()

    def begin(self) -> None:
        """Keep what is needed of the first weights; set hooks."""

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Task number `task` >= 1 comes next; `batches` is None in loops without tasks' data."""

    def penalty(self) -> Tensor | float:
        """What is added to the training loss, nats: a scalar."""
        return 0.0

    def gradients_ready(self) -> None:
        """Gradients stand in `.grad`, and are not clipped yet."""

    def step_done(self) -> None:
        """The optimizer has taken a step."""
        self.steps += 1
        self.after_step()

    def after_step(self) -> None:
        """The optimizer has taken step number `self.steps`."""

    def grown(self, before: dict[str, Tensor]) -> None:
        """The network has grown. `before`: old values of the MoE layers' parameters, in old shapes.

        Parameters may have been replaced by longer ones; hidden units are found again if needed.
        """

    def state(self) -> dict[str, Any]:
        """What training depends on beside weights and optimizer: plain values and tensors."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; the weights are back already."""

    def rebuild(self, state: dict[str, Any]) -> None:
        """Give the network the make that it had when `state` was taken, before weights are loaded.

        Needed only of interventions that change the network's parameters in the midst of training.
        """

    def plugin(self) -> Any:
        """What acts for it in Avalanche's loop; call once, after `attach`.

        Overridden where a plugin of Avalanche's own does the work. Such a one needs `state_dict`
        and `load_state_dict` besides its callbacks.
        """
        return InterventionPlugin(self)

    def without_tasks(self) -> str | None:
        """Why it cannot work in a loop without tasks, with the way out; None where it can."""
        return None

    def too_late(self, tasks: float, steps: int) -> str | None:
        """Why it would do nothing in a run of so many tasks and optimizer steps; None if it acts.

        With the way out; see `late`.
        """
        return None

    def unused(self) -> dict[str, str]:
        """Option -> why it has no effect with the others, and what to do."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything to resume from."""
        own = {"steps": self.steps, "generator": self.generator.get_state()}
        return own | {"own": self.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.steps = state["steps"]
        self.generator.set_state(state["generator"].cpu())
        self.restore(state["own"])

    def rebuild_from(self, state: dict[str, Any]) -> None:
        """Give network and optimizer the make of a `state_dict()`; their own states come next."""
        self.rebuild(state["own"])


class InterventionPlugin:
    """Avalanche plugin that calls an intervention's hooks; works with any Avalanche strategy.

    Args:
        intervention: already attached to the strategy's model and optimizer.
    """

    def __init__(self, intervention: Intervention) -> None:
        self.intervention = intervention
        self.state_dict = intervention.state_dict
        self.load_state_dict = intervention.load_state_dict
        self.rebuild_from = intervention.rebuild_from

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """A task starts."""
        task = strategy.clock.train_exp_counter
        if task == 0 or getattr(strategy, "resuming", False):
            return

        def batches() -> Iterable[tuple[Tensor, Tensor]]:
            position = getattr(strategy, "position", None)
            if position is not None:  # our own batches go on from there; training sets it again
                position.epoch = position.batch = 0
            for batch in strategy.dataloader:
                yield batch[0].to(strategy.device), batch[1].to(strategy.device)

        self.intervention.task_starts(task, batches)
        self._record(strategy)

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the penalty."""
        strategy.loss = strategy.loss + self.intervention.penalty()

    def after_backward(self, strategy: Any, **_: Any) -> None:
        """Gradients are there."""
        self.intervention.gradients_ready()

    def after_update(self, strategy: Any, **_: Any) -> None:
        """The optimizer has stepped."""
        self.intervention.step_done()
        self._record(strategy)

    @staticmethod
    def _record(strategy: Any) -> None:
        """Keep Avalanche's record of the optimizer's parameters: some may have been replaced."""
        strategy.optimized_param_id = dict(strategy.model.named_parameters())


def late(option: str, value: int, last: float, what: str = "optimizer step") -> str | None:
    """The `too_late` of an option that names a task or a step, where the last one is before it."""
    if value <= last:
        return None
    return (
        f"its {option} is {value}, and the last {what} of this run is number {last}; use "
        f"--intervention.{option} {last} or less, or a longer run"
    )


def one_task(tasks: float) -> str | None:
    """The `too_late` of those that act from the second task on."""
    return (
        None if tasks > 1 else "it acts from the second task on, and this run has 1; use --chunks 2"
    )


class NoIntervention(Intervention, name="none", source="ours"):
    """Plain training."""


class Periodic(Intervention, ABC):
    """Base of those that act at each task start, or every so many steps; `act` is what they do."""

    limits: ClassVar = {"every": Limit.AT_LEAST_0}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of interventions that act now and then."""

        every: int = 0
        """optimizer steps between two actions, for loops without tasks; 0 for at each task start"""

    @abstractmethod
    def act(self) -> None:
        """Change the network in place."""

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Act, unless steps are counted."""
        if not self.config.every:
            self.act()

    def after_step(self) -> None:
        """Act when it is time, if steps are counted."""
        if self.config.every and self.steps % self.config.every == 0:
            self.act()

    def without_tasks(self) -> str | None:
        """It must count steps there."""
        if self.config.every:
            return None
        return (
            f"intervention {self.name} acts at task starts, and there are none here; set its every"
        )

    def too_late(self, tasks: float, steps: int) -> str | None:
        """Its first action has to come."""
        every: int = self.config.every
        return late("every", every, steps) if every else one_task(tasks)


class Anchored(Intervention):
    """Base of those that look back at the network's first weights.

    What a growth draws, copies or rescales counts with the value that the growth gave it.
    """

    anchor: Anchor | None = None

    def begin(self) -> None:
        """Keep the first weights."""
        self.anchor = Anchor(self.model)

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, its value at the start, of its shape), for all that learn."""
        return self.anchor.pairs() if self.anchor else iter(())

    def state(self) -> dict[str, Any]:
        """The first weights, if kept."""
        return {"first": self.anchor.first if self.anchor else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the first weights back."""
        if self.anchor:
            self.anchor.load(state["first"])

    def grown(self, before: dict[str, Tensor]) -> None:
        """Give new units first weights, too."""
        if self.anchor:
            self.anchor.grown(before)

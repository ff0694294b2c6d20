"""Growth in a training loop of one's own: asks at the right moments, and writes what happened."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.growth.controller import GrowthController, GrowthEvent
from dynmoe.growth.probe import Probe
from dynmoe.growth.triggers.clock import Signals

MEASURED = frozenset({"loss", "grad_norm"})
"""Figures of `Signals` that the callback can give a trigger."""


class Writer(Protocol):
    """What is needed of TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number of one step."""


class GrowthCallback:
    """Asks a controller before each optimizer step and at each task start.

        callback = GrowthCallback(GrowthController(model, optimizer), SummaryWriter("runs/mine"))
        for step, batch in enumerate(batches):
            callback(step, task_starts=step in first_steps)
            loss = ...
            loss.backward()
            callback.backward_done(loss)      # for triggers that look at the loss or its gradient
            optimizer.step()

    Written at a growth are `growth/experts`, `growth/parameters` and, with a probe, its shock.

    Args:
        controller: of the model and its optimizer.
        writer: `SummaryWriter`, or what else has its `add_scalar`; None: nothing is written.
        probe: (inputs, labels) on the model's device, see `GrowthController.grow`; None: no shock,
            and no pruning by activations.
        prefix: of the tags.

    Raises:
        UserError: the controller's trigger looks at other figures than loss and gradient.
    """

    def __init__(
        self,
        controller: GrowthController,
        writer: Writer | None = None,
        probe: Probe | None = None,
        prefix: str = "growth/",
    ) -> None:
        self.controller, self.writer, self.probe, self.prefix = controller, writer, probe, prefix
        check_measured(controller, MEASURED)
        self._latest: dict[str, float] = {}

    def __call__(self, step: int, *, task_starts: bool = False) -> GrowthEvent | None:
        """Grow if the trigger says so; at a task start ask for that alone, and then as ever.

        Args:
            step: optimizer steps done.
            task_starts: a new task, not the first, begins.

        Returns:
            The growth, the latest if there were two, or None.
        """
        event = self._ask(Signals(step=step, task_starts=True)) if task_starts else None
        return self._ask(Signals(step=step)) or event

    def backward_done(self, loss: Tensor | float) -> None:
        """The gradients of a step are there, not clipped yet; `loss`, a scalar, is its loss."""
        needs = self.controller.trigger.needs
        if "loss" in needs:
            self._latest["loss"] = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if "grad_norm" in needs:
            own = (p.grad for p in self.controller.model.parameters())
            self._latest["grad_norm"] = float(
                nn.utils.get_total_norm([g for g in own if g is not None])
            )

    def _ask(self, signals: Signals) -> GrowthEvent | None:
        needs = self.controller.trigger.needs
        figures = dict.fromkeys(needs, math.nan)
        if not signals.task_starts:
            figures |= self._latest
            self._latest = {}
        asked = Signals(step=signals.step, task_starts=signals.task_starts, **figures)  # type: ignore[arg-type]
        event = self.controller.step(asked, None if self.probe is None else self._probe)
        if event is not None and self.writer is not None:
            shown = {"experts": event.experts, "parameters": event.parameters, **event.shock}
            for tag, value in shown.items():
                self.writer.add_scalar(self.prefix + tag, float(value), event.step)
        return event

    def _probe(self) -> Probe:
        assert self.probe is not None
        return self.probe


def check_measured(controller: GrowthController, measured: frozenset[str]) -> None:
    """Refuse a trigger that looks at what a loop does not measure.

    Raises:
        UserError: names the trigger and the figure, and triggers that work.
    """
    missing = sorted(controller.trigger.needs - measured)
    if missing:
        raise UserError(
            f"trigger {controller.trigger.name} looks at {', '.join(missing)}, which this callback "
            "does not measure; use the trigger task, every or at, or call GrowthController.step "
            "with Signals of your own"
        )

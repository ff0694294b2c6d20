"""What every run writes down in the same way: its progress, its growths, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dynmoe.errors import NumericError
from dynmoe.lab.board import EXPERTS
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.run import Run


class Recorder:
    """Writes one run down.

    Args:
        run: where.
        label: what is running, for the progress line.
        steps: of the whole run.
        state: everything to go on from, see `Session.state`.
        unit: what a step is, for the progress line.
    """

    def __init__(
        self,
        run: Run,
        label: str,
        steps: int,
        state: Callable[[], dict[str, Any]],
        unit: str = "steps",
    ) -> None:
        self.run, self.progress, self.state = run, ProgressLine(label, steps, unit), state

    def step_done(self, step: int, show: Callable[[], dict[str, Any]], **logged: int) -> None:
        """Show the progress, and save, when it is time for either.

        Args:
            step: of the whole run.
            show: the figures of the progress line; asked only when it is due.
            logged: see `Run.checkpoint`.

        Raises:
            Interrupted: a signal came; the run can be resumed from here.
        """
        if self.progress.due(step):
            self.progress.update(step, **show())
        if self.run.checkpoint_due():
            self.save(step, **logged)

    def save(self, step: int, **logged: int) -> None:
        """Write a checkpoint now."""
        self.run.checkpoint(step, self.state(), **logged)

    def log_growth(
        self, step: int, event: dict[str, Any], granularity: int, prefix: str = ""
    ) -> None:
        """Log a growth, its shock on the probe, and how many experts there are now.

        Args:
            step: of the whole run.
            event: what the controller tells of it.
            granularity: the new experts of a layer; makes the step in TensorBoard's chart.
            prefix: of the tags, where one run has several networks.
        """
        self.run.log.event(step, "growth", event)
        counts = {n: float(event[n]) for n in ("experts_before", "experts") if n in event}
        figures = event["shock"] | counts
        self.run.log.scalars(step, {f"{prefix}growth/{k}": v for k, v in figures.items()})
        chart = EXPERTS if not prefix else f"{EXPERTS}, {prefix.rstrip('/')}"
        for experts in (event["experts"] - granularity, event["experts"]):
            self.run.log.show(step, {chart: float(experts)})


def check_finite(model: nn.Module, step: int, remedy: str) -> None:
    """Refuse to save what cannot be gone on from.

    Raises:
        NumericError: a weight is not finite (the loss will not be either, but only at the next
            step); the checkpoints before are good.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericError(
                f"{name} is no longer finite at step {step}; earlier checkpoints are kept; {remedy}"
            )

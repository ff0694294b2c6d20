"""The stores that a run's log can be copied to: Weights & Biases, MLflow, and TensorBoard."""

from __future__ import annotations

import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

PROJECT = "dynmoe"
"""What runs go under, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise."""
AT_ONCE, PARAMS, LONGEST = 1000, 100, 500
"""MLflow's limits: metrics and parameters of a call, letters of a parameter."""


class Store(ABC):
    """Where a mirror copies to. All methods may raise whatever the store's package raises."""

    package: ClassVar[str]
    """that it needs, and the extra of dynmoe that brings it"""

    @abstractmethod
    def open(self, known: str | None, folder: Path, name: str, settings: dict[str, Any]) -> str:
        """Begin, or go on with the run `known`; returns what the store knows the run by.

        Args:
            known: what an earlier call returned for this run; None for a new one.
            folder: the run's.
            name: shown to people.
            settings: flat.
        """

    @abstractmethod
    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        """(step, tag -> number), in the order of the log."""

    @abstractmethod
    def close(self, final: dict[str, float] | None) -> None:
        """End: with the figures of a finished run, or None for one that was stopped."""


class Wandb(Store):
    """Weights & Biases. With WANDB_MODE=offline its files stay in the run's folder, `wandb`."""

    package = "wandb"

    def open(self, known: str | None, folder: Path, name: str, settings: dict[str, Any]) -> str:
        """As its `init`, with a run id of our own, which `resume` finds again."""
        import wandb

        known = known or secrets.token_hex(4)
        quiet = wandb.Settings(silent=True, console="off")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=known, resume="allow", name=name,
            dir=folder, config=settings, reinit="create_new", settings=quiet,
        )  # fmt: skip
        return known

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        """Its history, by our step."""
        for step, values in lines:
            if values:
                self.run.log(values, step=step)

    def close(self, final: dict[str, float] | None) -> None:
        """Its summary, and the end; a run that was stopped counts as failed until it goes on."""
        for tag, value in (final or {}).items():
            self.run.summary[tag] = value
        self.run.finish(exit_code=0 if final is not None else 1)


class Mlflow(Store):
    """MLflow; what is not allowed in its names becomes "_"."""

    package = "mlflow"

    def open(self, known: str | None, folder: Path, name: str, settings: dict[str, Any]) -> str:
        """A run of the experiment, with the settings as its parameters."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if known is not None:
            self.client.update_run(known, status="RUNNING")
            self.known = known
            return known
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(title)
        place = experiment.experiment_id if experiment else self.client.create_experiment(title)
        self.known = self.client.create_run(place, run_name=name).info.run_id
        params = [Param(_allowed(tag), str(value)[:LONGEST]) for tag, value in settings.items()]
        for first in range(0, len(params), PARAMS):
            self.client.log_batch(self.known, params=params[first : first + PARAMS])
        return self.known

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        """Its metrics, by our step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(_allowed(tag), value, now, step) for step, values in lines
            for tag, value in values.items()
        ]  # fmt: skip
        for first in range(0, len(metrics), AT_ONCE):
            self.client.log_batch(self.known, metrics=metrics[first : first + AT_ONCE])

    def close(self, final: dict[str, float] | None) -> None:
        """Its last metrics, and the end."""
        if final:
            self.send([(0, final)])
        self.client.set_terminated(self.known, "KILLED" if final is None else "FINISHED")


class TensorBoard(Store):
    """All numbers of the log by their own names, where a run's board shows a choice of them.

    Their files are in the run's folder, in `everything`, which TensorBoard lists as a run.
    """

    package = "tensorboard"

    def open(self, known: str | None, folder: Path, name: str, settings: dict[str, Any]) -> str:
        """A writer; of a run that goes on another one in the same folder."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "everything"))
        return "everything"

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        """Its scalars, by our step."""
        for step, values in lines:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def close(self, final: dict[str, float] | None) -> None:
        """The end; the figures of a finished run are in the run's own file."""
        self.writer.close()


STORES: dict[str, type[Store]] = {"wandb": Wandb, "mlflow": Mlflow, "tensorboard": TensorBoard}
"""Name of a mirror -> its store."""


def _allowed(tag: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", tag)

"""Callbacks for Lightning: plasticity and growth of any LightningModule that classifies.

    from dynmoe.integrations.lightning import GrowthCallback, PlasticityCallback
    trainer = Trainer(callbacks=[PlasticityCallback(images, labels), GrowthCallback(granularity=2)])

Numbers go to the trainer's loggers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.growth import GrowthCallback as Growth
from dynmoe.growth import GrowthController, GrowthEvent
from dynmoe.integrations import need
from dynmoe.plasticity import PlasticityCallback as Plasticity

need("lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402


class _Loggers:
    """The trainer's loggers, as a writer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @rank_zero_only
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Log one number."""
        for logger in self.trainer.loggers:
            logger.log_metrics({tag: scalar_value}, step=global_step)


def _ready(trainer: Trainer, module: LightningModule, tensor: Tensor) -> Tensor:
    """A tensor on the module's device, in the precision in which the trainer gives batches."""
    ready: Tensor = trainer.precision_plugin.convert_input(tensor.to(module.device))
    return ready


class PlasticityCallback(Callback):
    """Measures the module on a fixed batch every so many optimizer steps, and logs the numbers.

    Args:
        inputs: [N, ...]; `module(inputs)` must give logits [N, C].
        labels: [N] int class indices; None: no norms of gradients.
        every: optimizer steps from one measurement to the next.
        tags, prefix, classifier: see `dynmoe.plasticity.PlasticityCallback`.

    Raises:
        UserError: `every` below 1, when training begins.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        every: int = 100,
        tags: Collection[str] | None = None,
        prefix: str = "plasticity/",
        classifier: nn.Module | None = None,
    ) -> None:
        self.inputs, self.labels = inputs, labels
        self.options: dict[str, Any] = {"every": every, "tags": tags, "prefix": prefix}
        self.options["classifier"] = classifier
        self._measured = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the batch to the module's device and precision."""
        inputs = _ready(trainer, pl_module, self.inputs)
        labels = None if self.labels is None else _ready(trainer, pl_module, self.labels)
        self._callback = Plasticity(_Loggers(trainer), inputs, labels, **self.options)
        self._measured = -1

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure before a step, once however many batches are accumulated for it."""
        if trainer.global_step != self._measured:
            self._measured = trainer.global_step
            self._callback(pl_module, self._measured)


class GrowthCallback(Callback):
    """Grows the module's MoE layers; trigger, pruning and the like as `GrowthController` has them.

    A new task starts with each later `fit` that is given this same callback, and at the epochs
    named. The callback's state is in Lightning's checkpoints; give the module enough `max_experts`.

    Args:
        task_epochs: epochs, from 0, at whose start a new task begins.
        probe: (inputs, labels) for the shock and for pruning by activations; None: none.
        prefix: of what is logged at a growth: experts, parameters, and the shock.
        options: of `GrowthController`, such as `granularity=2`.

    Attributes:
        controller: once training has begun.

    Raises:
        UserError: several optimizers, or a trigger that looks at other figures than loss and
            gradient, when training begins.
    """

    controller: GrowthController

    def __init__(
        self,
        *,
        task_epochs: Collection[int] = (),
        probe: tuple[Tensor, Tensor] | None = None,
        prefix: str = "growth/",
        **options: Any,
    ) -> None:
        self.task_epochs, self.probe = frozenset(task_epochs), probe
        self.prefix, self.options = prefix, options
        self._known: dict[str, Any] | None = None  # the controller's state, to go on from
        self._trained, self._resumed, self._starts, self._asked = False, False, False, -1

    @property
    def events(self) -> list[GrowthEvent]:
        """All growths so far."""
        return self.controller.events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the controller of this `fit`'s optimizer; the state goes on.

        Raises:
            UserError: there is not exactly one optimizer.
        """
        if len(trainer.optimizers) != 1:
            raise UserError(
                f"GrowthCallback needs one optimizer, not {len(trainer.optimizers)}; use "
                "dynmoe.GrowthController in training_step"
            )
        self.controller = GrowthController(pl_module, trainer.optimizers[0], **self.options)
        if self._known is not None:
            self.controller.load_state_dict(self._known)
        probe: Any = self.probe and tuple(_ready(trainer, pl_module, t) for t in self.probe)
        self._callback = Growth(self.controller, _Loggers(trainer), probe, self.prefix)
        self._starts, self._asked = self._trained and not self._resumed, -1
        self._trained, self._resumed = True, False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task may start."""
        self._starts |= trainer.current_epoch in self.task_epochs and trainer.current_epoch > 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask before a step, once however many batches are accumulated for it."""
        if trainer.global_step == self._asked and not self._starts:
            return
        self._asked = trainer.global_step
        self._callback(self._asked, task_starts=self._starts)
        self._starts = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the gradient that the trigger may look at."""
        self._callback.backward_done(self._loss)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note the loss, a scalar; of accumulated batches it is that of the last."""
        self._loss = float(loss.detach()) * trainer.accumulate_grad_batches

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state for the next `fit`."""
        self._known = self.controller.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        if self._trained and not self._resumed:
            self._known = self.controller.state_dict()
        return {"controller": self._known, "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints: the `fit` that follows goes on and starts no task."""
        self._known, self._trained = state_dict["controller"], state_dict["trained"]
        self._resumed = True

"""Callbacks for Hugging Face's Trainer: plasticity and growth of any model that classifies.

    from dynmoe.integrations.hugging_face import GrowthCallback, PlasticityCallback
    PlasticityCallback(images, labels).add_to(trainer)
    GrowthCallback(granularity=2).add_to(trainer)

Numbers go wherever `trainer.log` sends them: the log history, TensorBoard, W&B.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from dynmoe.growth import GrowthCallback as Growth
from dynmoe.growth import GrowthController, GrowthEvent
from dynmoe.growth.callback import check_measured
from dynmoe.integrations import need
from dynmoe.plasticity import PlasticityCallback as Plasticity

need("transformers", "transformers")

from transformers import Trainer, TrainerCallback  # noqa: E402


class _Logits(nn.Module):
    """A model whose output is its logits alone; its modules are the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, C] of the model's first argument."""
        out = self.model(inputs)
        if isinstance(out, Tensor):
            return out
        return out["logits"] if isinstance(out, Mapping) else out.logits


class _Callback(TrainerCallback):
    """Base: knows its trainer, for its log."""

    trainer: Trainer

    def add_to(self, trainer: Trainer) -> Any:
        """Add it to a trainer's callbacks; returns the callback."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Keep a number until `_send`: a trainer logs several at a time."""
        self._values[tag] = scalar_value

    def _begin(self) -> None:
        self._values: dict[str, float] = {}

    def _send(self) -> None:
        if self._values:
            self.trainer.log(self._values)
            self._values = {}


class PlasticityCallback(_Callback):
    """Measures the model on a fixed batch every so many optimizer steps, and logs the numbers.

    Args:
        inputs: [N, ...], the model's first argument; its output must be logits [N, C] or have them
            as `logits`.
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the batch to the model's device."""
        self._begin()
        labels = None if self.labels is None else self.labels.to(args.device)
        self._model = _Logits(kwargs["model"])
        self._callback = Plasticity(self, self.inputs.to(args.device), labels, **self.options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before a step."""
        self._callback(self._model, state.global_step)
        self._send()


class GrowthCallback(_Callback):
    """Grows the model's MoE layers; trigger, pruning and the like as `GrowthController` has them.

    A new task starts with each later `trainer.train()`, also of another trainer that this same
    callback is added to, and at the epochs named. The controller's state is in no checkpoint of
    the trainer: keep `callback.controller.state_dict()` beside it, and give it to
    `callback.load_state_dict` before `trainer.train(resume_from_checkpoint=...)`.

    Args:
        task_epochs: epochs, from 0, at whose start a new task begins; of data with a length.
        probe: (inputs, labels) for the shock and for pruning by activations; None: none.
        prefix: of what is logged at a growth: experts, parameters, and the shock.
        options: of `GrowthController`, such as `granularity=2`.

    Attributes:
        controller: once training has begun.

    Raises:
        UserError: a trigger that looks at other figures than the gradient, when training begins.
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
        self._known: dict[str, Any] | None = None
        self._resumed, self._starts = False, False

    @property
    def events(self) -> list[GrowthEvent]:
        """All growths so far."""
        return self.controller.events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the controller of this training's optimizer, if it is new; the state goes on."""
        self._begin()
        wrapped = kwargs["optimizer"]
        optimizer = getattr(wrapped, "optimizer", wrapped)  # accelerate's holds torch's
        known = getattr(self, "controller", None)
        if known is None or known.optimizer is not optimizer:  # hooks stay with an optimizer
            self.controller = GrowthController(kwargs["model"], optimizer, **self.options)
        check_measured(self.controller, frozenset({"grad_norm"}))
        if self._known is not None:
            self.controller.load_state_dict(self._known)
        probe: Any = self.probe and tuple(t.to(args.device) for t in self.probe)
        self._callback = Growth(self.controller, self, probe, self.prefix)
        self._starts = self._known is not None and not self._resumed
        self._resumed = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A task may start; not where a resumed training goes on within an epoch."""
        epoch = round(state.epoch or 0)
        at_start = abs((state.epoch or 0) - epoch) < 1e-6
        self._starts |= at_start and epoch > 0 and epoch in self.task_epochs

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask before a step."""
        self._callback(state.global_step, task_starts=self._starts)
        self._starts = False
        self._send()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take `controller.state_dict()`: the training that follows goes on and starts no task."""
        self._known, self._resumed = state, True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the state for the next training."""
        self._known = self.controller.state_dict()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the gradient, as the trainer has clipped it, that the trigger may look at."""
        self._callback.backward_done(0.0)

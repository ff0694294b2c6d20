"""Avalanche's supervised strategy with fast batches, exact resume and a stop at bad losses.

This is the one file where we build on Avalanche's training templates; it imports Avalanche at the
top, so import it only once training is about to begin.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_benchmarks.losses import LossOver, StreamLoss
from cl_benchmarks.stream import Augment, Batches, Position, chunk_of
from dynmoe.errors import NumericError
from dynmoe.lab import processes
from dynmoe.moe import collect_aux_losses, finish_step
from dynmoe.moe.passes import share_batch

CLOCK = ("train_iterations", "train_exp_counter", "train_exp_epochs", "train_exp_iterations",
         "train_epoch_iterations", "total_iterations")  # fmt: skip


class Observer(Protocol):
    """Looks on and writes down; sees the trainer after plugins and clock have moved on."""

    def batch_done(self, trainer: StreamTrainer) -> None:
        """An optimizer step is done."""

    def epoch_done(self, trainer: StreamTrainer) -> None:
        """An epoch is done; the position stands at the next one."""

    def task_done(self, trainer: StreamTrainer) -> None:
        """All epochs of an experience are done."""


class StreamTrainer(SupervisedTemplate):
    """Trains one network on one experience after another.

    Several processes that share a run (see `dynmoe.lab.processes`) have a part of each batch each,
    and take the step that one process would take on the whole of it. `loss` is that of the whole.

    Args:
        model, optimizer, plugins, device: as Avalanche's.
        epochs: per experience.
        batch_size: samples per step.
        seed: decides the order of samples and their augmentation.
        augment: see `Batches`.
        clip: largest global gradient norm; 0 for no clipping.
        reset_optimizer: clear the optimizer's state at each experience.
        loss_over: the classes in the loss, see `StreamLoss`.
        precision: of training passes; float32, or bfloat16 for autocast. Outputs are float32.
        observer: told of each step, epoch and task once all plugins have acted on it.

    Attributes:
        cross_entropy: of the loss; plugins and metrics take it, too.
        position: task, epoch and batch that training has reached.
        resuming: true between `resume` and the point where the saved state is put back; plugins
            must not act on a task start meanwhile, as it has happened before.
    """

    loss: Tensor  # of the batch at hand; Avalanche sets it

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        plugins: list[Any],
        epochs: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        augment: Augment = "none",
        clip: float = 0.0,
        reset_optimizer: bool = False,
        loss_over: LossOver = "all",
        precision: torch.dtype = torch.float32,
        observer: Observer | None = None,
    ) -> None:
        self.cross_entropy = StreamLoss(loss_over)
        for plugin in plugins:
            plugin.supports_distributed = True  # else Avalanche warns: gradients are ours to join
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=self.cross_entropy,
            train_mb_size=batch_size,
            train_epochs=epochs,
            device=device,
            plugins=plugins,
            evaluator=None,
        )
        # Without metrics or periodic evaluation Avalanche's own plugins do nothing, at every hook.
        self.plugins = [*plugins, self.clock]
        self.own_plugins = plugins
        self.seed, self.augment, self.clip = seed, augment, clip
        self.reset_optimizer, self.precision = reset_optimizer, precision
        self.observer = observer
        self.position = Position()
        self._saved: dict[str, Any] | None = None
        self._right: Tensor | None = None  # of several processes' batch
        self.batches: Batches
        share_batch(processes.joined())

    @property
    def resuming(self) -> bool:
        """Whether a saved state waits to be put back."""
        return self._saved is not None

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`: the next `train` must get the experience it was saved in."""
        self._saved = state
        self.position.task = state["position"][0]

    def state_dict(self) -> dict[str, Any]:
        """Everything training depends on, the global random generators excepted."""
        return {
            "position": [self.position.task, self.position.epoch, self.position.batch],
            "clock": {name: getattr(self.clock, name) for name in CLOCK},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plugins": [plugin.state_dict() for plugin in self.own_plugins],
        }

    def forward(self) -> Tensor:
        """Outputs [B, C], float32; under autocast where the network trains in bfloat16.

        Passes in evaluation mode, such as a growth's probe, are float32.
        """
        half = self.precision != torch.float32 and self.model.training
        with torch.autocast(self.device.type, self.precision, enabled=half):
            outputs = super().forward()
        return outputs.float() if half else outputs

    def criterion(self) -> Tensor:
        """`StreamLoss` plus the MoE layers' auxiliary losses, nats: a scalar.

        Raises:
            NumericError: the loss is not finite; nothing has been updated with it.
        """
        shared = self.is_training and processes.joined()
        loss = self._part_of_loss() if shared else super().criterion()
        loss = loss + sum(collect_aux_losses(self.model).values())
        if self.is_training and not shared:
            self._check(loss)
        return loss

    def backward(self) -> None:
        """Gradients of the loss on the whole batch.

        Raises:
            NumericError: its loss is not finite, see `criterion`; for several processes.
        """
        super().backward()
        if processes.joined():
            own = self.loss.detach().sum()
            right = (self.mb_output.detach().argmax(dim=1) == self.mb_y).sum()
            figures = torch.stack([own, right.to(own.dtype)])
            sums = processes.average_gradients(self.model.parameters(), figures)
            self.loss, self._right = sums[:1] / processes.size(), sums[1] / self.batches.whole
            self._check(self.loss)

    def accuracy(self) -> Tensor:
        """Share of the batch at hand that was labelled right before the step, a scalar."""
        if processes.joined():
            assert self._right is not None, "after the backward pass"
            return self._right
        return (self.mb_output.detach().argmax(dim=1) == self.mb_y).float().mean()

    def _part_of_loss(self) -> Tensor:
        """What this process's rows add to the mean loss of the batch; there may be none."""
        if not len(self.mb_y):
            return self.mb_output.sum()
        share = processes.own_share(len(self.mb_y), self.batches.whole)
        return super().criterion() * share

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(value := loss.item()):
            raise NumericError(
                f"the loss is {value} in task {self.position.task + 1}, epoch "
                f"{self.position.epoch + 1}, batch {self.position.batch}; the last checkpoint is "
                "kept; a smaller --lr or --clip 1 may help"
            )

    def optimizer_step(self) -> None:
        """Clip, if asked to, and step; MoE layers move what moves once per step."""
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        finish_step(self.model)

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Our batches in place of Avalanche's loader."""
        self.position.task = self.clock.train_exp_counter
        if self._saved is not None:
            self.position.task = self._saved["position"][0]
        if self.cross_entropy.over != "all":
            stream, so_far = self.experience.origin_stream, range(self.position.task + 1)
            self.cross_entropy.task_starts([stream[k].classes_in_this_experience for k in so_far])
        self.batches = Batches(
            chunk_of(self.experience),
            self.train_mb_size,
            self.seed,
            self.position,
            self.device,
            self.augment,
            (processes.rank(), processes.size()),
        )
        self.dataloader = self.batches

    def make_optimizer(self, **kwargs: Any) -> None:
        """Keep Avalanche's record of the optimizer; reset its state where the protocol says so."""
        if self.reset_optimizer and not self.resuming:
            kwargs["reset_optimizer_state"] = True
        super().make_optimizer(**kwargs)

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        """Epochs of one experience, from the position that training has reached."""
        self.position.epoch, self.position.batch = 0, 0
        if self._saved is not None:
            self._put_back(self._saved)
        while self.position.epoch < self.train_epochs:
            self._before_training_epoch(**kwargs)
            self.clock.train_epoch_iterations = self.position.batch  # not 0 in a resumed epoch
            self.training_epoch(**kwargs)
            self.position.epoch += 1
            self.position.batch = 0
            self._after_training_epoch(**kwargs)

    def _after_training_iteration(self, **kwargs: Any) -> None:
        super()._after_training_iteration(**kwargs)
        if self.observer is not None:
            self.observer.batch_done(self)

    def _after_training_epoch(self, **kwargs: Any) -> None:
        super()._after_training_epoch(**kwargs)
        if self.observer is not None:
            self.observer.epoch_done(self)

    def _after_training_exp(self, **kwargs: Any) -> None:
        if self.observer is not None:
            self.observer.task_done(self)
        super()._after_training_exp(**kwargs)

    def _put_back(self, state: dict[str, Any]) -> None:
        self._saved = None
        for plugin, saved in zip(self.own_plugins, state["plugins"], strict=True):
            if hasattr(plugin, "rebuild_from"):  # it may have changed what parameters there are
                plugin.rebuild_from(saved)
        self.optimized_param_id = dict(self.model.named_parameters())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for plugin, saved in zip(self.own_plugins, state["plugins"], strict=True):
            plugin.load_state_dict(saved)
        for name, value in state["clock"].items():
            setattr(self.clock, name, value)
        self.position.task, self.position.epoch, self.position.batch = state["position"]

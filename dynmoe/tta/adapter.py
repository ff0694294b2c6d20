"""The contract of test-time adaptation: batches in, logits out, and a model that learns by them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import finish_step
from dynmoe.registry import Part, PartConfig
from dynmoe.tta import params
from dynmoe.tta.entropy import possible_classes, sound
from dynmoe.tta.options import check_types, make_config
from dynmoe.tta.params import UnfitModelError


class Adapter(nn.Module, Part, ABC, kind="tta"):
    """Base of all methods. Subclasses choose what to train in `prepare`, and define `adapt`.

    The model is adapted in place. It stays in evaluation mode (no dropout), but for BatchNorm
    layers, which normalise by the batch; `train()` and `eval()` of an adapter change nothing.

    `state_dict()` holds the whole model and everything else that the next step depends on, so a run
    goes on bit for bit in an adapter that was built of the same model with the same options. As in
    torch, its tensors are the adapter's own: copy them if they are to outlive the next step.

    The model may be compiled, parallel, behind a normalisation, in half precision; it and the
    adapter may be moved at any time (`to`, `half`, `cuda`), and all that is kept moves along.

    Args:
        config: the method's options.
        model: images [B, C, H, W] -> logits [B, classes].

    Attributes:
        config: the method's options.
        steps: updates taken.
        skipped: batches that were not learnt from because their loss was not finite.
        memory: what the method has learnt of the stream besides weights; None, numbers, tensors
            (float32 or wider), dicts and lists of them.
        generator: the method's random numbers, on the model's device or, with `draws_on_cpu`, on
            the CPU.
        source_images: how many source images `observe_source` asks for; 0 for none.

    Raises:
        UserError: the model has nothing that the method can train, or an option has a wrong type.
    """

    config: Any
    adapts: bool = True
    source_images: int = 0
    draws_on_cpu: bool = False

    def __init__(self, config: PartConfig, model: nn.Module) -> None:
        super().__init__()
        check_types(config)
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.by_batch = self.adapts and params.use_batch_statistics(model)
        self.like = self._first_weight()
        device = torch.device("cpu") if self.draws_on_cpu else self.device
        self.generator = torch.Generator(device).manual_seed(getattr(config, "seed", 0))
        self.steps = 0
        self.skipped = 0
        self.memory: dict[str, Any] = {}
        self.optimizer: Optimizer | None = None
        params.work_alone(model)
        with torch.inference_mode(False), torch.enable_grad():
            self.prepare()
            self.start = {k: v.detach().clone() for k, v in params.tensors_to_keep(model).items()}
            self.mark_start()

    @property
    def device(self) -> torch.device:
        """Where the model was when it was last looked at."""
        return self.like.device

    @staticmethod
    def by_classes(classes: int) -> dict[str, Any]:
        """Options whose default (None) follows the number of classes: their values for so many."""
        return {}

    @staticmethod
    def by_stream(stream: str, config: PartConfig) -> dict[str, Any]:
        """Options whose default (None) follows the stream that the command runs: their values.

        They may depend on the other options, those of `config`.
        """
        return {}

    @abstractmethod
    def prepare(self) -> None:
        """Rebuild the model, make the optimizer of what is trained, set `memory`."""

    def check_side(self, side: int) -> None:
        """Refuse images whose shorter side has so many pixels; here none.

        Raises:
            UserError: an option does not suit them.
        """

    @abstractmethod
    def adapt(self, images: Tensor) -> Tensor:
        """Learn from images [B, C, H, W] and give their logits [B, classes]; grad is enabled."""

    def learn_source(self, batches: Iterable[Tensor]) -> None:
        """Learn from images [B, C, H, W] of the source; grad is enabled."""

    def observe_source(self, batches: Iterable[Any]) -> None:
        """Learn what the method needs to know of source images, before the stream.

        Does nothing where `source_images` is 0. After an error the adapter is as it was.

        Args:
            batches: `source_images` images in all; a batch is images [B, C, H, W], or a tuple, list
                or dict that holds such a tensor, on any device and of any floating dtype.

        Raises:
            UserError: there are no batches, or one is unfit for a call.
        """
        if not self.source_images:
            return
        self._follow_model()
        before = copy.deepcopy(self.get_extra_state())
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self.learn_source(self._source(batches))
        except BaseException:
            self.set_extra_state(before)
            raise
        self.mark_start()

    def forward(self, images: Tensor) -> Tensor:
        """Adapt once to images [B, C, H, W]; their logits [B, classes], without gradient.

        Raises:
            UserError: the batch is empty or no batch of images, or one image for a model that
                normalises by batch.
        """
        self._follow_model()
        with torch.inference_mode(False), torch.enable_grad():
            return self.adapt(self._checked(images)).detach()

    def _checked(self, images: Tensor) -> Tensor:
        """A batch that can be learnt from, or a UserError."""
        if images.dim() != 4 or not len(images):
            raise UserError(
                f"{self.name}: images of shape {list(images.shape)} are no batch [B, C, H, W]"
            )
        if self.by_batch and len(images) == 1:
            raise UserError(
                f"{self.name}: the model's BatchNorm layers normalise by the batch, which needs at "
                "least 2 images; use larger batches or a model without BatchNorm"
            )
        return images.clone() if images.is_inference() else images

    def _source(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The images of batches of any kind, as the model takes them; at least one batch."""
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise UserError(
                f"{self.name}: observe_source takes batches, such as [images] or a DataLoader, "
                f"not one {type(batches).__name__}"
            )
        empty = True
        for batch in batches:
            images, empty = self._checked(_images_of(batch, self.name)), False
            yield images.to(self.like if images.is_floating_point() else self.device)
        if empty:
            raise UserError(
                f"{self.name}: no source images were given; observe_source needs one batch or more"
            )

    def option(self, name: str, logits: Tensor) -> Any:
        """An option, or its default for the classes of logits [B, classes], see `by_classes`."""
        given = getattr(self.config, name)
        return self.by_classes(possible_classes(logits))[name] if given is None else given

    def use_sgd(self, parameters: list[nn.Parameter], lr: float, momentum: float) -> None:
        """Train these parameters with SGD, without weight decay.

        Raises:
            UserError: lr not above 0, or momentum not in [0, 1).
        """
        if not 0 < lr < float("inf") or not 0 <= momentum < 1:
            raise UserError(
                f"{self.name}: lr={lr} must be above 0 and momentum={momentum} in [0, 1)"
            )
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    def finite(self, loss: Tensor, logits: Tensor) -> bool:
        """Whether the loss, a scalar, is finite and the logits [B, C] are `sound`.

        Else the batch counts as skipped.

        A sample without weight in the loss spoils the gradients too: 0 times nan is nan.
        """
        if bool(loss.isfinite() & sound(logits)):
            return True
        self.skipped += 1
        return False

    def learn(self, loss: Tensor, logits: Tensor) -> bool:
        """Take one step down the loss, a scalar, if it and the logits [B, C] are `finite`.

        Returns whether the step was taken.
        """
        if not self.finite(loss, logits):
            return False
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        return self.take_step()

    def take_step(self) -> bool:
        """Step by the gradients that there are; where it cannot be done the batch is skipped."""
        assert self.optimizer is not None
        done = params.take_step(self.optimizer)
        finish_step(self.model)
        self.steps += done
        self.skipped += not done
        return done

    def mark_start(self) -> None:
        """Let `reset` return to what memory, optimizer and random numbers are now."""
        self._first = copy.deepcopy(self.get_extra_state())

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start: weights, buffers, optimizer, memory, random numbers, counters."""
        self.restore_weights()
        self.set_extra_state(self._first)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put the model's tensors and the optimizer back to the start, and nothing else."""
        for name, tensor in params.tensors_to_keep(self.model).items():
            tensor.copy_(self.start[name])
        if self.optimizer is not None:
            params.load_optimizer(self.optimizer, copy.deepcopy(self._first["optimizer"]))

    def get_start(self) -> dict[str, Any]:
        """What `reset` returns to and methods look back at: tensors of the model, and the rest."""
        return {"tensors": dict(self.start), "extra": self._first}

    def set_start(self, state: dict[str, Any]) -> None:
        """Restore `get_start()` in an adapter that was built of other weights."""
        kept = params.tensors_to_keep(self.model)
        self.start = {name: value.to(kept[name]) for name, value in state["tensors"].items()}
        self._first = copy.deepcopy(state["extra"])

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` holds beside the tensors of the model; plain values and tensors."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "memory": dict(self.memory),
            "generator": self.generator.get_state(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    @torch.inference_mode(False)
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore `get_extra_state()`."""
        state = copy.deepcopy(state)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.memory = params.moved(state["memory"], self.like)
        self.generator.set_state(state["generator"].cpu())
        if self.optimizer is not None:
            params.load_optimizer(self.optimizer, state["optimizer"])

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        """As of every module (`to`, `half`, `cuda`, ...), and all that is kept moves along."""
        super()._apply(fn, recurse)
        self._follow_model()
        return self

    @torch.no_grad()
    def _follow_model(self) -> None:
        """Bring what is kept beside the model to its device and dtype, if that has changed."""
        like, before = self._first_weight(), self.like
        if (like.device, like.dtype) == (before.device, before.dtype):
            return
        self.like = like
        kept = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.start = {name: value.to(kept[name]) for name, value in self.start.items()}
        self.memory = params.moved(self.memory, like)
        if self.optimizer is not None:
            params.move_state(self.optimizer)
        if like.device != before.device and not self.draws_on_cpu:
            self.generator = params.moved_generator(self.generator, like.device)
            first = torch.Generator(like.device).manual_seed(getattr(self.config, "seed", 0))
            self._first["generator"] = first.get_state()

    def _first_weight(self) -> Tensor:
        """Without data: an empty tensor on the model's device, of its dtype."""
        first = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        return first.new_empty(0)

    def train(self, mode: bool = True) -> Adapter:
        """Do nothing: which layers are in training mode belongs to the method."""
        return self


def adapt(model: nn.Module, method: str = "moetta", **options: Any) -> Adapter:
    """Wrap a trained model into a method of test-time adaptation.

    Example: `adapter = adapt(model, "moetta", num_experts=9)`, then `adapter(images)` per batch.

    Args:
        model: images [B, C, H, W] -> logits [B, classes]; adapted in place.
        method: name of a registered method.
        options: fields of its Config.

    Raises:
        UserError: an unknown method or option, or the method cannot adapt this model. The message
            names methods that can.
    """
    config = make_config(method, options)
    try:
        return config.build(model)
    except UnfitModelError as error:
        fit = [name for name in registry.names("tta") if _fits(name, model)]
        raise UnfitModelError(f"{error}. What fits: {', '.join(fit)}") from None


def _fits(method: str, model: nn.Module) -> bool:
    """Whether a method, with its defaults, can adapt a model; tried on a copy."""
    try:
        make_config(method, {}).build(copy.deepcopy(model))
    except UserError:
        return False
    return True


def _images_of(batch: Any, method: str) -> Tensor:
    """The images of a batch: itself, or the first tensor [B, C, H, W] that it holds."""
    if isinstance(batch, Tensor):
        return batch
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    for part in parts if isinstance(parts, list | tuple) else []:
        if isinstance(part, Tensor) and part.dim() == 4:
            return part
    raise UserError(
        f"{method}: a {type(batch).__name__} without a tensor of images [B, C, H, W] is no batch"
    )

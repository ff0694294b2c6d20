"""The contract of test-time adaptation: batches in, logits out, and a model that learns by them."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe import registry
from dynmoe.errors import UserError, unknown
from dynmoe.registry import Part, PartConfig
from dynmoe.tta.params import tensors_to_keep, use_batch_statistics


class Adapter(nn.Module, Part, ABC, kind="tta"):
    """Base of all methods. Subclasses choose what to train in `prepare`, and define `adapt`.

    The model is adapted in place. It stays in evaluation mode (no dropout), but for BatchNorm
    layers, which normalise by the batch; `train()` and `eval()` of an adapter change nothing.

    `state_dict()` holds the whole model and everything else that the next step depends on, so a run
    goes on bit for bit in an adapter that was built of the same model with the same options. As in
    torch, its tensors are the adapter's own: copy them if they are to outlive the next step.

    Args:
        config: the method's options.
        model: images [B, C, H, W] -> logits [B, classes].

    Attributes:
        config: the method's options.
        steps: updates taken.
        skipped: batches that were not learnt from because their loss was not finite.
        memory: what the method has learnt of the stream besides weights; None, numbers, tensors.
        generator: the method's random numbers, on the model's device.
        source_images: how many source images `observe_source` asks for; 0 for none.

    Raises:
        UserError: the model has nothing that the method can train.
    """

    config: Any
    adapts: bool = True
    source_images: int = 0

    def __init__(self, config: PartConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.by_batch = self.adapts and use_batch_statistics(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.generator = torch.Generator(self.device).manual_seed(getattr(config, "seed", 0))
        self.steps = 0
        self.skipped = 0
        self.memory: dict[str, Any] = {}
        self.optimizer: Optimizer | None = None
        self.prepare()
        self.start = {k: v.detach().clone() for k, v in tensors_to_keep(model).items()}
        self.mark_start()

    @abstractmethod
    def prepare(self) -> None:
        """Rebuild the model, make the optimizer of what is trained, set `memory`."""

    @abstractmethod
    def adapt(self, images: Tensor) -> Tensor:
        """Learn from images [B, C, H, W] and give their logits [B, classes]; grad is enabled."""

    def observe_source(self, batches: Iterable[Tensor]) -> None:
        """Learn what the method needs to know of source images, before the stream; by default none.

        Args:
            batches: images [B, C, H, W], `source_images` of them in all.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Adapt once to images [B, C, H, W]; their logits [B, classes], without gradient.

        Raises:
            UserError: the batch is empty or no batch of images, or one image for a model that
                normalises by batch.
        """
        if images.dim() != 4 or not len(images):
            raise UserError(
                f"{self.name}: images of shape {list(images.shape)} are no batch [B, C, H, W]"
            )
        if self.by_batch and len(images) == 1:
            raise UserError(
                f"{self.name}: the model's BatchNorm layers normalise by the batch, which needs at "
                "least 2 images; use larger batches or a model without BatchNorm"
            )
        with torch.inference_mode(False), torch.enable_grad():
            images = images.clone() if images.is_inference() else images
            return self.adapt(images).detach()

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
        """Whether the loss and all logits are finite; else the batch counts as skipped.

        A sample without weight in the loss spoils the gradients too: 0 times nan is nan.
        """
        if bool(loss.isfinite() & logits.isfinite().all()):
            return True
        self.skipped += 1
        return False

    def learn(self, loss: Tensor, logits: Tensor) -> bool:
        """Take one step of the optimizer down the loss; whether all was `finite`, else do not."""
        if not self.finite(loss, logits):
            return False
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return True

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
        for name, tensor in tensors_to_keep(self.model).items():
            tensor.copy_(self.start[name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self._first["optimizer"]))

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` holds beside the tensors of the model; plain values and tensors."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "memory": dict(self.memory),
            "generator": self.generator.get_state(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore `get_extra_state()`."""
        state = copy.deepcopy(state)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.memory = _moved(state["memory"], self.device)
        self.generator.set_state(state["generator"].cpu())
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

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
        UserError: an unknown method or option, or the method cannot adapt this model.
    """
    config = registry.get("tta", method).Config
    known = [field.name for field in dataclasses.fields(config)]
    for option in options:
        if option not in known:
            raise unknown(f"option of {method}", option, known)
    return config(**options).build(model)


def _moved(value: Any, device: torch.device) -> Any:
    """The value with all tensors in it on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value

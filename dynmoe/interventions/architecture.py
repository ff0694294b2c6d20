"""Interventions that change the network: normalisation, CReLU, plasticity injection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Anchored, Batches, Intervention, Limit, late, one_task
from dynmoe.interventions.units import UnitLayer, find_units, refuse_frozen
from dynmoe.interventions.weights import (
    linear_outputs,
    replace_module,
    swap_parameter,
    weight_matrices,
)
from dynmoe.registry import PartConfig


class LayerNormIntervention(
    Intervention, name="layernorm", source="Lyle et al. 2023 (arXiv 2303.01486), Section 5"
):
    """Puts layer normalisation (Ba et al. 2016) before the activations of hidden layers.

    Linear layers get LayerNorm, convolutions GroupNorm with one group. Layers that are normalised
    already, frozen, or read by a frozen one stay as they are, and so does what is inside an MoE
    layer.
    """

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Insert the normalisation; it draws nothing."""
        refuse_frozen(find_units(model), self.name)
        insert_norms(model)


def insert_norms(model: nn.Module) -> None:
    """Normalise before the activation of every hidden layer that learns and is not normalised yet.

    The model is changed in place.

    Raises:
        UserError: no hidden layer is found.
    """
    for layer in find_units(model):
        if layer.bank is not None or layer.norms or layer.frozen:
            continue
        weight = layer.incoming[0].parameter
        convolution = weight.dim() == 4
        norm = nn.GroupNorm(1, len(weight)) if convolution else nn.LayerNorm(len(weight))
        replace_module(model, layer.source, nn.Sequential(layer.source, norm.to(weight)))


class CReLU(Intervention, name="crelu", source="Abbas et al. 2023 (arXiv 2303.07507), Section 5"):
    """Hidden layers pass on relu(x) and relu(-x), from half the units.

    The layer before each ReLU, and any normalisation between, keeps the first half of its outputs,
    so what reads the activations does not change and the network gets no more parameters. What is
    inside an MoE layer, frozen, or read by a frozen layer stays as it is.
    """

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Halve and mirror, where ReLUs stand behind even numbers of units; it draws nothing."""
        layers = [u for u in find_units(model) if isinstance(u.activation, nn.ReLU)]
        if not layers:
            raise UserError("intervention crelu: the network has no ReLU behind a layer of its own")
        refuse_frozen(layers, self.name)
        layers = [layer for layer in layers if not layer.frozen]
        for layer in layers:
            if layer.units % 2:
                raise UserError(
                    f"intervention crelu: layer {layer.name} has {layer.units} units, an odd number"
                )
        for layer in layers:
            _halve(layer)
            replace_module(model, layer.source, nn.Sequential(layer.source, Mirror()))


class Mirror(nn.Module):
    """x [B, U, ...] -> `[x, -x]` [B, 2U, ...]: what a ReLU behind it makes a CReLU.

    Vectors and their sequences [B, T, U] are mirrored in the last axis, images in the second.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate x and -x: [..., D] to [..., 2 D], images [B, C, H, W] to [B, 2 C, H, W]."""
        return torch.cat([x, -x], dim=1 if x.dim() == 4 else -1)


@torch.no_grad()
def _halve(layer: UnitLayer) -> None:
    """Keep the first half of the units in what feeds and normalises them."""
    half = layer.units // 2
    sizes = ("out_features", "out_channels", "num_features", "num_channels")
    for module in (layer.incoming[0].module, *layer.norms):
        for name, parameter in list(module.named_parameters(recurse=False)):
            kept = nn.Parameter(parameter[:half].clone(), parameter.requires_grad)
            setattr(module, name, kept)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dim() == 1:
                setattr(module, name, buffer[:half].clone())
        for name in sizes:
            if hasattr(module, name):
                setattr(module, name, half)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (half, *module.normalized_shape[1:])


class NaP(Anchored, name="nap", source="Lyle et al. 2024 (arXiv 2407.01800), Section 4"):
    """Normalises before activations, and keeps every weight matrix at its first norm.

    Layers are normalised as by `layernorm`. After optimizer steps each weight matrix is scaled back
    to the Frobenius norm that it began with (after a growth: that its units began with). Biases,
    the normalisation's scales and matrices that begin with zeros learn freely.
    """

    limits: ClassVar = {"every": Limit.AT_LEAST_1}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of normalise and project."""

        every: int = 1
        """optimizer steps between two projections"""
        normalise: bool = True
        """insert the normalisation; without it only norms are kept"""

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Normalise before activations."""
        if self.config.normalise:
            insert_norms(model)

    @torch.no_grad()
    def after_step(self) -> None:
        """Project when it is time."""
        if self.steps % self.config.every:
            return
        first = dict(self.pairs())
        for slot in weight_matrices(self.model):
            weight, norm = slot.parameter, first[slot.parameter].norm()
            scale = norm / weight.norm().clamp_min(1e-12)
            weight.mul_(torch.where(norm > 0, scale, 1.0))


class Injection(
    Intervention, name="injection", source="Nikishin et al. 2023 (arXiv 2305.15555), Section 4"
):
    """Once, freezes the output layer and lets a new one learn beside it.

    The output becomes `h(z) + h_new(z) - h_copy(z)`, where h is the layer as it stands and h_copy
    what h_new starts with; both stay as they are. The outputs do not change at that moment, and as
    many parameters learn as before. The head is the last linear layer here; the paper's is deeper.
    """

    reshapes = True
    limits: ClassVar = {"task": Limit.AT_LEAST_1, "step": Limit.AT_LEAST_0}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of plasticity injection."""

        task: int = 2
        """the task at whose start to inject; the first is 0, where nothing happens"""
        step: int = 0
        """the optimizer step after which to inject instead; 0 for at a task start"""

    config: Config

    def begin(self) -> None:
        """See that the output layers are linear."""
        self.done = False
        linear_outputs(self.model, self.name)

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Inject when it is time."""
        if not self.config.step and task == self.config.task:
            self.inject()

    def after_step(self) -> None:
        """Inject when it is time."""
        if self.steps == self.config.step:
            self.inject()

    def inject(self) -> None:
        """Freeze the output layers and put new ones beside them; the optimizer follows."""
        for old in linear_outputs(self.model, self.name):
            head = Injected(old, self.generator)
            for name, parameter in old.named_parameters():
                swap_parameter(self.optimizer, parameter, getattr(head.new, name))
            replace_module(self.model, old, head)
        self.done = True

    def without_tasks(self) -> str | None:
        """It must count steps there."""
        if self.config.step:
            return None
        return "intervention injection acts at a task start, and there are none here; set its step"

    def too_late(self, tasks: float, steps: int) -> str | None:
        """There must be learning after it."""
        if self.config.step:
            return late("step", self.config.step, steps - 1, "optimizer step but one")
        return one_task(tasks) or late("task", self.config.task, tasks - 1, "task")

    def unused(self) -> dict[str, str]:
        """One of the two says when."""
        return {"task": "--intervention.step counts steps; use one"} if self.config.step else {}

    def state(self) -> dict[str, Any]:
        """Whether it has happened."""
        return {"done": self.done}

    def rebuild(self, state: dict[str, Any]) -> None:
        """Let there be new output layers, if there were."""
        if state["done"] and not self.done:
            self.inject()


class Injected(nn.Module):
    """A frozen linear layer with a new one beside it; [..., D_in] -> [..., D_out].

    Args:
        frozen: the layer so far.
        generator: draws the new one, uniform in +-1/sqrt(D_in).

    Attributes:
        new: the layer that learns; all else is kept in buffers.
    """

    frozen_weight: Tensor
    frozen_bias: Tensor | None
    copy_weight: Tensor
    copy_bias: Tensor | None

    def __init__(self, frozen: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        weight, bound = frozen.weight.detach(), frozen.in_features**-0.5
        self.new = nn.utils.skip_init(  # which draws nothing from torch's global generator
            nn.Linear, frozen.in_features, frozen.out_features, bias=frozen.bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        for parameter in self.new.parameters():
            fresh = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(fresh)
        for name in ("weight", "bias"):
            for kind, layer in (("frozen", frozen), ("copy", self.new)):
                value = getattr(layer, name)
                kept = None if value is None else value.detach().clone()
                self.register_buffer(f"{kind}_{name}", kept)

    def zero(self) -> None:
        """Let the outputs be 0, for a loop that begins each task so; the new layer learns on."""
        for value in (*self.parameters(), *self.buffers()):
            value.data.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """The frozen outputs of z [..., D], plus what the new layer has learnt: [..., outputs]."""
        frozen = F.linear(z, self.frozen_weight, self.frozen_bias)
        return frozen + self.new(z) - F.linear(z, self.copy_weight, self.copy_bias)

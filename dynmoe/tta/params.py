"""The tensors of a model: which ones a method trains, holding and moving them, half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.tta.entropy import wide

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which torch's wrappers (compile, data parallel, FSDP, checkpoints) hold a module."""


class UnfitModelError(UserError):
    """The model has none of the layers that a method adapts."""


NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
"""Layers whose scale and shift methods train; subclasses such as timm's count."""


def affine_parameters(
    model: nn.Module, method: str, keep: Callable[[str, nn.Module], bool] = lambda name, norm: True
) -> list[nn.Parameter]:
    """Scales and shifts of the normalisation layers that `keep` accepts, in module order.

    `keep` gets a layer's name, without torch's wrappers, and the layer.

    Raises:
        UnfitModelError: there are none; the message names `method`.
    """
    found = [
        parameter
        for name, module in plain_modules(model)
        if isinstance(module, NORMS) and keep(name, module)
        for parameter in (module.weight, module.bias)
        if parameter is not None
    ]
    if not found:
        raise UnfitModelError(
            f"{method} adapts normalisation layers, and the model has none with weights that it "
            "may train (LayerNorm, BatchNorm or GroupNorm); use another method or model"
        )
    return found


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) in module order; names are as if torch's wrappers were not there."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


def innermost(model: nn.Module) -> nn.Module:
    """The model inside its wrappers: as long as one child alone has parameters, that child.

    So it is the same for a model, its compiled or parallel form, and one behind a normalisation.
    """
    while True:
        inner = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(inner) != 1:
            return model
        (model,) = inner


def channel_last_norms(model: nn.Module) -> list[tuple[str, nn.LayerNorm]]:
    """(name, layer) of the LayerNorms with weights over the last axis, in module order.

    Those that take images [B, C, H, W] (`LayerNorm2d` of timm and torchvision) are left out.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        and module.elementwise_affine
        and len(module.normalized_shape) == 1
        and "2d" not in type(module).__name__
    ]


@contextmanager
def holding(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Let the parameters hold other values, by name and of their shapes, within the block.

    Graphs of earlier passes stay valid, and wrappers of any kind see the values.
    """
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def use_batch_statistics(model: nn.Module) -> bool:
    """Let BatchNorm layers normalise by the batch's own statistics; whether there are any.

    As Wang et al. 2021 (arXiv 2006.10726), Section 3: the source's statistics are dropped.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return bool(layers)


def work_alone(model: nn.Module) -> None:
    """Let DistributedDataParallel's processes each adapt to their own stream, without exchange.

    It would wait for gradients of weights that no method trains, and for the other processes.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = module.require_forward_param_sync = False


def tensors_to_keep(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that adaptation may change: what is trained, and all buffers.

    By name, in their shapes.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


LOST = "remainder"
"""Key of an optimizer's state: what a weight in half precision cannot hold of its value."""


@torch.no_grad()
def take_step(optimizer: Optimizer) -> bool:
    """Step, in float32 for weights in half precision; False, and no step, on bad gradients there.

    Steps smaller than the spacing of such weights add up in the optimizer's state, so that they
    learn as float32 weights do. Other weights are stepped as ever.
    """
    narrow = [p for p in trained_by(optimizer) if p.grad is not None and wide(p) is not p]
    if not all(bool(p.grad.isfinite().all()) for p in narrow):  # type: ignore[union-attr]
        return False
    held = [p.data for p in narrow]
    for parameter in narrow:
        assert parameter.grad is not None
        gradient, parameter.grad = wide(parameter.grad), None
        lost = optimizer.state[parameter].get(LOST, 0.0)
        parameter.data = wide(parameter.data) + lost
        parameter.grad = gradient
    optimizer.step()
    for parameter, weight in zip(narrow, held, strict=True):
        exact, parameter.grad = parameter.data, None
        parameter.data = weight.copy_(exact)
        optimizer.state[parameter][LOST] = exact - wide(weight)
    return True


@torch.no_grad()
def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Restore `state_dict()`, in float32 for weights in half precision, where torch rounds it."""
    optimizer.load_state_dict(saved)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, trained_by(optimizer), strict=True):
        if wide(parameter) is not parameter and index in saved["state"]:
            optimizer.state[parameter] = dict(saved["state"][index])
    move_state(optimizer)


@torch.no_grad()
def move_state(optimizer: Optimizer) -> None:
    """Bring the state to the parameters' devices, in their dtype or float32 if that is wider."""
    for parameter in trained_by(optimizer):
        state = optimizer.state.get(parameter, {})
        if wide(parameter) is parameter:
            state.pop(LOST, None)
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":  # which torch keeps on the CPU
                state[key] = moved(value, parameter)


def trained_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, in the order of its `state_dict()`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def moved(value: Any, like: Tensor) -> Any:
    """The value, its tensors, of any shape, on like's device.

    Numbers with a point take like's dtype, or float32 if that is wider.
    """
    if isinstance(value, Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        return value.to(like.device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: moved(item, like) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, like) for item in value]
    return value


def moved_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on another device: seeded as this one if nothing was drawn, else by a draw."""
    seed = generator.initial_seed()
    unused = torch.Generator(generator.device).manual_seed(seed).get_state()
    if not torch.equal(generator.get_state(), unused):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)

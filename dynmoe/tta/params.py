"""Which tensors of a model a method trains, and the model's normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dynmoe.errors import UserError

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which torch's wrappers (compile, data parallel, FSDP, checkpoints) hold a module."""
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
"""Layers whose scale and shift methods train; subclasses such as timm's count."""


def affine_parameters(
    model: nn.Module, method: str, keep: Callable[[str, nn.Module], bool] = lambda name, norm: True
) -> list[nn.Parameter]:
    """Scales and shifts of the normalisation layers that `keep` accepts, in module order.

    `keep` gets a layer's name, without torch's wrappers, and the layer.

    Raises:
        UserError: there are none; the message names `method`.
    """
    found = [
        parameter
        for name, module in plain_modules(model)
        if isinstance(module, NORMS) and keep(name, module)
        for parameter in (module.weight, module.bias)
        if parameter is not None
    ]
    if not found:
        raise UserError(
            f"{method} adapts normalisation layers, and the model has none with weights that it "
            "may train (LayerNorm, BatchNorm or GroupNorm); use method noadapt or another model"
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


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands below the model; also for a compiled `old`, uncompiled."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not old:
                continue
            if name == "_orig_mod" and parent is not model:
                replace_module(model, parent, new)  # it would go on calling what it compiled
            else:
                setattr(parent, name, new)


@contextmanager
def holding(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Let the parameters hold other values, by name, within the block.

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
    """The tensors of a model that adaptation may change: what is trained, and all buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())

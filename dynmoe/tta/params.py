"""Which tensors of a model a method trains, and the model's normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynmoe.errors import UserError

NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
"""Layers whose scale and shift methods train; subclasses such as timm's count."""


def affine_parameters(
    model: nn.Module, method: str, keep: Callable[[str], bool] = lambda name: True
) -> list[nn.Parameter]:
    """Scales and shifts of the normalisation layers whose name `keep` accepts, in module order.

    Raises:
        UserError: there are none; the message names `method`.
    """
    found = [
        parameter
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and keep(name)
        for parameter in (module.weight, module.bias)
        if parameter is not None
    ]
    if not found:
        raise UserError(
            f"{method} adapts normalisation layers, and the model has none with weights that it "
            "may train (LayerNorm, BatchNorm or GroupNorm); use method noadapt or another model"
        )
    return found


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
    """Put `new` wherever `old` stands below the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def use_batch_statistics(model: nn.Module) -> bool:
    """Let BatchNorm layers normalise by the batch's own statistics; whether there are any.

    As Wang et al. 2021 (arXiv 2006.10726), Section 3: the source's statistics are dropped.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return bool(layers)


def tensors_to_keep(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that adaptation may change: what is trained, and all buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())

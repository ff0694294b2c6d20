"""What is done with all MoE layers of a model at once.

State that moves with training is moved in one place, after each optimizer step: `finish_step`.
Forward passes only note what they saw (counts, sums). So recomputation, gradient accumulation, a
layer that is used twice and acting without learning change nothing until the step is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynmoe.errors import UserError
from dynmoe.moe.draws import Noise
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.router import Router


@contextmanager
def routing_inputs(
    model: nn.Module, mask: Tensor | None = None, context: Tensor | None = None
) -> Iterator[None]:
    """Hand every MoE layer of a model a padding mask or a context for passes in the block.

    mask [B, ...] is False for padding and context [B, ...] is what routers may look at, each with
    an entry per position or per sample, as in `MoELayer.forward`.
    """
    layers = [layer for _, layer in moe_layers(model)]
    before = [layer.routing_context for layer in layers]
    for layer in layers:
        layer.routing_context = (mask, context)
    try:
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.routing_context = former


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    """(name, layer) of every MoE layer in a model, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield name, module


def collect_aux_losses(model: nn.Module) -> dict[str, Tensor]:
    """Weighted auxiliary losses by `layer.loss` name, to be added to the objective; scalars.

    Added up over all passes in training mode since they were collected last (or since the latest
    optimizer step, see `finish_step`), so that a layer which is used twice counts twice.
    Collecting hands them out once. Empty where no layer has a loss.

    Under a reentrant checkpoint their gradient reaches the layers in the backward pass of the
    objective: add them to it before that.
    """
    return {
        f"{name}.{loss}": value
        for name, layer in moe_layers(model)
        for loss, value in layer.collect_losses().items()
    }


def finish_step(model: nn.Module) -> None:
    """Move what one optimizer step moves: selection biases, prototypes, sparsity, noise, counts.

    Where torch.distributed runs, what the passes noted is added up over all processes first; every
    process must call this equally often. Without a training pass since the last call nothing
    moves, so that calling it twice does no harm.
    """
    for module in stepped(model):
        module.finish_step()


def stepped(model: nn.Module) -> list[MoELayer | Router | Noise]:
    """The modules that `finish_step` moves, in module order."""
    return [m for m in model.modules() if isinstance(m, (MoELayer, Router, Noise))]


def register_step_hook(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Call `finish_step(model)` after every step of the optimizer.

    Needed once per model and optimizer for the routers `prototypes`, `relu` and all noisy ones, and
    for the losses `loss-free` and `global-balance`; `GrowthController` does it for its optimizer.

    Returns:
        a handle whose `remove()` ends it.
    """
    return optimizer.register_step_post_hook(lambda *_: finish_step(model))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards everything a forward pass may change is put back.

    That is: training flags, buffers, what MoE layers keep of their last pass, torch's random state
    (CPU and the model's CUDA devices).
    """
    modules = list(model.modules())
    training = [m.training for m in modules]
    buffers = [(m, n, b, b.clone()) for m in modules for n, b in m.named_buffers(recurse=False)]
    passes = [(layer, layer.last_routing, layer.last_losses) for _, layer in moe_layers(model)]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            model.eval()
            yield
        finally:
            for module, flag in zip(modules, training, strict=True):
                module.training = flag
            for module, name, buffer, before in buffers:
                _restore_buffer(module, name, buffer, before)
            for layer, last, losses in passes:
                layer.last_routing, layer.last_losses = last, losses


@torch.no_grad()
def _restore_buffer(module: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    """Put the buffer's object and values back."""
    setattr(module, name, buffer)
    # Written only on a change: a write would invalidate graphs that saved the buffer for backward.
    if not torch.equal(buffer, before):
        buffer.copy_(before)


def share_router(model: nn.Module) -> list[str]:
    """Let MoE layers that are alike use the router module of the first of them.

    One router for all layers is the Omni-router's (Gu et al. 2025, arXiv 2507.05724). Layers are
    alike if their routers are of one kind and of equal shapes (input width and most experts among
    them) and the same experts exist; there may be several such sets. Each layer still routes its
    own input. What a router counts or adapts in training mode then sees every pass of every layer,
    and growth draws its new rows once.

    Call this before the optimizer is made and before growth. A growth that splits gates
    (`init duplicate`) preserves the function where the layers have equal hidden sizes.

    Returns:
        Names of the layers whose router was replaced.

    Raises:
        UserError: no two MoE layers are alike.
    """
    routers: dict[object, Router] = {}
    layers = list(moe_layers(model))
    replaced = []
    for name, layer in layers:
        first = routers.setdefault(_likeness(layer.router), layer.router)
        if first is not layer.router:
            layer.router = first
            replaced.append(name)
    if len(routers) == len(layers):
        raise UserError(
            f"no router can be shared: the model has {len(layers)} MoE layers, and no two of them "
            "agree in kind of router, input width, number of experts and max_experts"
        )
    return replaced


def _likeness(router: Router) -> object:
    """A key that is equal for routers that can stand for each other."""
    shapes = tuple((name, tuple(value.shape)) for name, value in router.state_dict().items())
    return type(router), shapes, tuple(router.active.tolist())

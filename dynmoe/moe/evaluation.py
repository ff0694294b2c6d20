"""Looking at a model in the midst of training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynmoe.moe.layer import moe_layers


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

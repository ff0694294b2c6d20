"""State that moves with training, moved in one place: after each optimizer step.

Forward passes only note what they saw (counts, sums). So recomputation, gradient accumulation, a
layer that is used twice and acting without learning change nothing until the step is done.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynmoe.moe.layer import MoELayer
from dynmoe.moe.noise import Noise
from dynmoe.moe.router import Router


def finish_step(model: nn.Module) -> None:
    """Move what one optimizer step moves: selection biases, prototypes, sparsity, noise, counts.

    Where torch.distributed runs, what the passes noted is added up over all processes first; every
    process must call this equally often. Without a training pass since the last call nothing
    moves, so that calling it twice does no harm.
    """
    for module in model.modules():
        if isinstance(module, (MoELayer, Router, Noise)):
            module.finish_step()


def register_step_hook(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Call `finish_step(model)` after every step of the optimizer.

    Needed once per model and optimizer for the routers `prototypes`, `relu` and all noisy ones, and
    for the losses `loss-free` and `global-balance`; `GrowthController` does it for its optimizer.

    Returns:
        a handle whose `remove()` ends it.
    """
    return optimizer.register_step_post_hook(lambda *_: finish_step(model))

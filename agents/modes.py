"""The two modes of a policy. Acting: as it is evaluated. Learning: the same, with balancing on.

What makes a policy act differently from one pass to the next (noise of routers, dropout, statistics
of a batch) is off in both, so that before an update the policy that learns is the policy that
acted: all probability ratios are 1. Only routers and auxiliary losses know that they learn; their
losses and the statistics that they keep follow the minibatches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dynmoe.moe.layer import MoELayer
from dynmoe.moe.loss import AuxLoss
from dynmoe.moe.router import Router


@contextmanager
def acting(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: nothing of the policy moves."""
    with _training(policy, ()):
        yield


@contextmanager
def learning(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode but for MoE layers, routers and auxiliary losses."""
    with _training(policy, (MoELayer, Router, AuxLoss)):
        yield


@contextmanager
def _training(policy: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Training mode for modules of these kinds alone; afterwards all flags are put back."""
    before = [(module, module.training) for module in policy.modules()]
    try:
        for module, _ in before:
            module.training = isinstance(module, kinds)
        yield
    finally:
        for module, flag in before:
            module.training = flag

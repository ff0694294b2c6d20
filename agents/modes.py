"""The two modes of a policy. Acting: as it is evaluated. Learning: so that it acts the same.

What makes a policy act differently from one pass to the next (noise of routers, dropout, statistics
of a batch) is off in both, so that before an update the policy that learns is the policy that
acted: all probability ratios are 1. Everything else is in training mode while it learns: auxiliary
losses are computed, and statistics of routers and interventions follow the minibatches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dynmoe.moe.draws import Noise

CHANGEABLE: tuple[type[nn.Module], ...] = (
    Noise, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.RReLU, nn.MultiheadAttention, nn.RNNBase,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip
"""Modules whose outputs differ in training mode."""


@contextmanager
def acting(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: nothing of the policy moves."""
    with _kept(policy):
        policy.eval()
        yield


@contextmanager
def learning(policy: nn.Module) -> Iterator[None]:
    """Training mode inside the block, but for modules whose outputs would differ in it."""
    with _kept(policy):
        policy.train()
        for module in policy.modules():
            if isinstance(module, CHANGEABLE):
                module.eval()
        yield


@contextmanager
def _kept(policy: nn.Module) -> Iterator[None]:
    """Put all training flags back after the block."""
    before = [(module, module.training) for module in policy.modules()]
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag

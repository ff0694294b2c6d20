"""Entropies of predictions, and means over the samples that are trusted. Nats; B samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """[B] Shannon entropy of softmax(logits [B, classes]), in float32 or wider."""
    log_p = wide(logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def wide(values: Tensor) -> Tensor:
    """The values in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean_of(values: Tensor, trusted: Tensor) -> Tensor:
    """Mean of values [B] over the trusted [B] bool; 0, without gradient, where there are none."""
    return torch.where(trusted, values, 0.0).sum() / trusted.sum().clamp(min=1)


def margin(given: float | None, share: float, logits: Tensor) -> float:
    """An entropy margin: the one given, or that share of the largest entropy, ln classes."""
    return share * math.log(logits.shape[1]) if given is None else given

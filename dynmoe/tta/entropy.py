"""Entropies of predictions, and means over the samples that are trusted. Nats; B samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_entropy(logits: Tensor) -> Tensor:
    """[B] Shannon entropy of softmax(logits [B, classes]), in float32 or wider."""
    log_p = wide(logits).log_softmax(dim=1)
    return cross_entropy(log_p, log_p)


def mean_prediction_entropy(logits: Tensor) -> Tensor:
    """Scalar: H(mean_b p_b) of logits [B, classes], in float32 or wider.

    Large where a batch's answers are spread over the classes. Information maximisation lowers the
    mean of H(p_b) and raises this (Krause et al. 2010, "Discriminative clustering by regularized
    information maximization"; Liang et al. 2020, SHOT, arXiv 2002.08546, Eqs. 3-4).
    """
    mean = wide(logits).softmax(dim=1).mean(dim=0)
    return -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[B] `-sum_c p log q` of log-probabilities [B, classes]; a class with p = q = 0 adds 0.

    So masked classes (logits of -inf) count for nothing, in the value and in the gradient.
    """
    p = log_p.exp()
    return -(p * log_q.masked_fill((p == 0) & log_q.isneginf(), 0.0)).sum(dim=1)


def sound(logits: Tensor) -> Tensor:
    """bool []: whether every row of logits [B, classes] gives probabilities.

    It does where its largest logit is finite: -inf masks a class, nan and inf spoil the row.
    """
    return logits.amax(dim=1).isfinite().all()


def possible_classes(logits: Tensor) -> int:
    """C of logits [B, classes]: classes that are masked (-inf) in every row do not count."""
    return max(int((~logits.isneginf()).any(dim=0).sum()), 1)


def wide(values: Tensor) -> Tensor:
    """Values of any shape in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean_of(values: Tensor, trusted: Tensor) -> Tensor:
    """Mean of values [B] over the trusted [B] bool; 0, without gradient, where there are none."""
    return torch.where(trusted, values, 0.0).sum() / trusted.sum().clamp(min=1)


def margin(given: float | None, share: float, logits: Tensor) -> float:
    """An entropy margin, nats: the one given, or that share of the largest entropy, ln C.

    logits: [B, C].
    """
    return share * math.log(possible_classes(logits)) if given is None else given


def tent_loss(logits: Tensor, reliable: bool = False, im: float = 0.0) -> Tensor:
    """Scalar: `mean_S H - im H(mean_b p_b)` of logits [B, classes], in nats.

    S is the whole batch, or with `reliable` {H < 0.4 ln C}; where S is empty its mean is 0.
    """
    h = softmax_entropy(logits)
    trusted = h.detach() < margin(None, 0.4, logits)
    loss = mean_of(h, trusted) if reliable else h.mean()
    return loss - im * mean_prediction_entropy(logits) if im else loss

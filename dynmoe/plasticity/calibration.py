"""Calibration: does a classifier's confidence say how often it is right?

The confidence of a sample is the probability of its predicted class. Where a model is calibrated,
the share `a` is right of all samples of confidence `a`. Both errors here sort the samples into bins
and add up, weighted by the bins' sizes, how far mean confidence and accuracy of a bin are apart:
`sum_b (n_b / N) |accuracy_b - confidence_b|`, in 0..1; 0 is best.

Shapes: N samples, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15
"""Guo et al. 2017"""


def confidences(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence [N] in 0..1, float64, and whether the prediction is right, [N] bool; on the CPU.

    Args:
        logits: [N, C]; -inf for masked classes. Of equal logits the first class is predicted.
        labels: [N] int64, on any device.
    """
    logits = logits.detach().double()
    best = logits.argmax(dim=1, keepdim=True)
    chosen = logits.softmax(dim=1).gather(1, best).squeeze(1)
    return chosen.cpu(), best.squeeze(1).cpu() == labels.cpu()


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: bins of equal width, `((b - 1) / bins, b / bins]`.

    Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3.

    Args:
        confidence: [N] in 0..1. right: [N] bool. bins: their number.

    Returns:
        the error; nan without samples, or where a confidence is nan.
    """
    if not _known(confidence):
        return math.nan
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    return _gap(confidence, right.double(), place)


def adaptive_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Adaptive calibration error: bins of equal mass, from the least sure samples to the surest.

    confidence [N] and right [N], of N samples.

    Sizes differ by one at most; with fewer samples than bins each is a bin. Equal mass is that of
    Nguyen and O'Connor 2015 (arXiv 1508.05154), Section 4, and of Nixon et al. 2019 (arXiv
    1904.01685), who also bin the probabilities of all other classes; here the predicted class
    counts alone, as in the expected calibration error. Samples of equal confidence share their
    accuracy, so that their order does not matter (ours).

    Args, Returns: as `calibration_error`.
    """
    if not _known(confidence):
        return math.nan
    _, group, size = confidence.unique(return_inverse=True, return_counts=True)
    shared = (torch.bincount(group, right.double()) / size)[group]
    order = confidence.argsort(stable=True)
    parts = order.tensor_split(min(bins, len(order)))
    place = torch.empty_like(order)
    for number, part in enumerate(parts):
        place[part] = number
    return _gap(confidence, shared, place)


def calibration(confidence: Tensor, right: Tensor) -> dict[str, float]:
    """`ece` and `adaptive_ece` of confidences [N] and right answers [N] bool, with 15 bins each."""
    return {
        "ece": calibration_error(confidence, right),
        "adaptive_ece": adaptive_calibration_error(confidence, right),
    }


def _known(confidence: Tensor) -> bool:
    return len(confidence) > 0 and not bool(confidence.isnan().any())


def _gap(confidence: Tensor, right: Tensor, place: Tensor) -> float:
    """`sum_b |sum of (right - confidence) in bin b| / N` for bins `place` [N] int64."""
    return float(torch.bincount(place, right - confidence.double()).abs().sum() / len(place))

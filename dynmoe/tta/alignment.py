"""Do shifts pull a model the same way? Cosines between the gradients of different domains.

MoETTA's reason for experts (Fan et al. 2025, arXiv 2511.13760): where the gradients of two domains
point apart, one set of weights cannot follow both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.tta.entropy import entropy
from dynmoe.tta.params import affine_parameters


def accumulated_gradient(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Sum over batches of the gradient of Tent's loss, the mean entropy; float64 [P].

    The gradient is that of all scales and shifts of normalisation layers, P numbers, at the
    weights as they are; the model is left unchanged.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        batches: images [B, C, H, W].

    Raises:
        UserError: the model has no such layers.
    """
    parameters = affine_parameters(model, "alignment")
    learnt = [p.requires_grad for p in parameters]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for images in batches:
            loss = entropy(model(images)).mean()
            gradients = torch.autograd.grad(loss, parameters)
            total += torch.cat([g.flatten() for g in gradients]).double().cpu()
    finally:
        for parameter, was in zip(parameters, learnt, strict=True):
            parameter.requires_grad_(was)
    return total


def alignment(model: nn.Module, domains: Mapping[str, Iterable[Tensor]]) -> Tensor:
    """Cosines [K, K] between the accumulated gradients of K domains, float64."""
    gradients = [accumulated_gradient(model, batches) for batches in domains.values()]
    unit = F.normalize(torch.stack(gradients), dim=1)
    return unit @ unit.T


def mean_alignment(cosines: Tensor) -> float:
    """Mean over all pairs of different domains of cosines [K, K]."""
    count = len(cosines)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))

"""Effective rank of the empirical neural tangent kernel: how many ways it can still learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.errors import NumericError
from dynmoe.moe.model import undisturbed
from dynmoe.plasticity.routing import entropy


def entk_matrix(model: nn.Module, inputs: Tensor, max_samples: int = 64) -> Tensor:
    """K = J J^T, [m, m] float64, J the gradient of each sample's summed logits (eval mode).

    One backward pass per sample (m = the first `max_samples` inputs), since routers that choose
    experts have data-dependent control flow, which `torch.func.vmap` cannot trace. Keeps m
    gradients at once: m * P * 4 bytes for P float32 parameters.

    Raises:
        ValueError: no input, or no parameter that learns.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    m = min(len(inputs), max_samples)
    if m == 0 or not parameters:
        raise ValueError("the tangent kernel needs at least one input and one trainable parameter")
    rows = []
    with undisturbed(model), torch.enable_grad():
        for i in range(m):
            summed = model(inputs[i : i + 1]).sum()
            rows.append(torch.autograd.grad(summed, parameters, allow_unused=True))
    kernel = torch.zeros(m, m, dtype=torch.double, device=parameters[0].device)
    for j, parameter in enumerate(parameters):
        found = [row[j] if row[j] is not None else torch.zeros_like(parameter) for row in rows]
        block = torch.stack(found).reshape(m, -1).double()
        kernel += block @ block.T
    return kernel


def entk_effective_rank(model: nn.Module, inputs: Tensor, max_samples: int = 64) -> float:
    """exp of the entropy of the tangent kernel's normalised eigenvalues, within 1..m; 0 if K = 0.

    Eigenvalues of J J^T are squared singular values of J, so this is not the `effective_rank` of
    the rank metric applied to J.

    Args:
        model: maps inputs [n, ...] to logits [n, C]; left undisturbed.
        inputs: [n, ...]; the first `max_samples` are used (64 is enough, see below).

    Raises:
        ValueError: no input, or no parameter that learns.
        NumericError: a gradient is not finite.

    Source: SPHERE (arXiv 2605.04712): K = J J^T, plasticity = exp(entropy of its spectrum).
    """
    kernel = entk_matrix(model, inputs, max_samples)
    if not bool(torch.isfinite(kernel).all()):
        raise NumericError("a gradient of the tangent kernel is not finite")
    values = torch.linalg.eigvalsh(kernel).clamp_min(0.0)
    total = values.sum()
    return float(entropy(values / total).exp()) if total > 0 else 0.0

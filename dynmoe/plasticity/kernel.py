"""The empirical neural tangent kernel of a network, and its effective rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dynmoe.errors import NumericError
from dynmoe.moe.model import undisturbed
from dynmoe.plasticity.metrics import effective_rank

KERNEL_COLUMNS = 2048
"""Parameters whose gradients enter the tangent kernel at a time: in the cache, as float64"""


def entk_matrix(model: nn.Module, inputs: Tensor, max_samples: int = 64) -> Tensor:
    """K = J J^T, [m, m] float64, J the gradient of each sample's summed logits (eval mode).

    By `torch.func.vmap` over the samples (m = the first `max_samples` inputs), or with a backward
    pass for each: routers that choose experts have data-dependent control flow, which it cannot
    trace, and different modules may share a parameter. Keeps m gradients at once: m * P * 4 bytes
    for P float32 parameters.

    Raises:
        ValueError: no input, or no parameter that learns.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    m = min(len(inputs), max_samples)
    if m == 0 or not parameters:
        raise ValueError("the tangent kernel needs at least one input and one trainable parameter")
    with undisturbed(model):
        try:
            at_once = None if _tied(model) else _gradients_at_once(model, parameters, inputs[:m])
        except RuntimeError:  # control flow by data, or an operation that cannot be batched
            at_once = None
        gradients = at_once or _gradients_one_by_one(model, inputs[:m])
    kernel = torch.zeros(m, m, dtype=torch.double, device=inputs.device)
    for gradient in gradients:
        for part in gradient.reshape(m, -1).split(KERNEL_COLUMNS, dim=1):
            part = part.double()
            kernel += part @ part.T
    return kernel


def _gradients_at_once(
    model: nn.Module, parameters: dict[str, Tensor], inputs: Tensor
) -> list[Tensor]:
    """Each sample's gradient of its summed logits, [m, ...] for each parameter, by `vmap`."""

    def summed(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        # A module at two places is swapped once: torch's tie_weights would put back traced tensors.
        inputs = (sample.unsqueeze(0),)
        return functional_call(model, parameters, inputs, tie_weights=False).sum()

    return list(vmap(grad(summed), in_dims=(None, 0))(parameters, inputs).values())


def _tied(model: nn.Module) -> bool:
    """Whether different modules share a parameter; one module at several places does not."""
    places = [
        id(parameter)
        for module in model.modules()
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    return len(set(places)) < len(places)


def _gradients_one_by_one(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The same, a backward pass for each sample."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with torch.enable_grad():
        for sample in inputs.split(1):
            summed = model(sample).sum()
            rows.append(torch.autograd.grad(summed, parameters, materialize_grads=True))
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


def entk_effective_rank(model: nn.Module, inputs: Tensor, max_samples: int = 64) -> float:
    """exp of the entropy of the tangent kernel's normalised eigenvalues, within 1..m; 0 if K = 0.

    Eigenvalues of J J^T are squared singular values of J, so this is not the `effective_rank` of
    the rank metric applied to J.

    Args:
        model: maps inputs [n, ...] to logits [n, C]; left undisturbed.
        inputs: [n, ...]; the first `max_samples` are used.

    Raises:
        ValueError: no input, or no parameter that learns.
        NumericError: a gradient is not finite.

    Source: SPHERE (arXiv 2605.04712): K = J J^T, plasticity = exp(entropy of its spectrum).
    """
    kernel = entk_matrix(model, inputs, max_samples)
    if not bool(torch.isfinite(kernel).all()):
        raise NumericError("a gradient of the tangent kernel is not finite")
    return effective_rank(torch.linalg.eigvalsh(kernel).clamp_min(0.0))

"""How far one module's function is from another's: the report on every conversion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.evaluation import undisturbed


@dataclass(frozen=True)
class FunctionChange:
    """What became of the outputs y when a module was replaced; dy is the difference."""

    largest: float
    """max |dy|, in the unit of the outputs"""
    relative: float
    """||dy|| / ||y||, over all outputs at once; 0 where both are 0"""
    cosine: float
    """of the two output tensors, flattened; 1 where the replacement differs by a factor only"""


def output_change(before: Tensor, after: Tensor) -> FunctionChange:
    """Compare outputs of equal shape; worked out in float64.

    `relative` is what a growth reports as `output_change`.
    """
    before, after = before.double().flatten(), after.double().flatten()
    difference = (after - before).abs()
    size, norm = before.norm(), difference.norm()
    return FunctionChange(
        largest=float(difference.max()),
        relative=float(norm / size) if norm > 0 else 0.0,
        cosine=float(F.cosine_similarity(before, after, dim=0)) if norm > 0 else 1.0,
    )


@torch.no_grad()
def function_change(before: nn.Module, after: nn.Module, x: Tensor) -> FunctionChange:
    """Compare what two modules make of x, in evaluation mode; both are left as they were."""
    with undisturbed(before):
        old = before(x)
    with undisturbed(after):
        new = after(x)
    return output_change(old, new)

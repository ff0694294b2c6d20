"""Plasticity of any network on one batch, as named numbers."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.plasticity.kernel import entk_effective_rank
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.metrics import mean_activity
from dynmoe.plasticity.probes import Probe, output_layer, take_probe


def measure(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    classifier: nn.Module | None = None,
    kernel_samples: int = 0,
) -> dict[str, float]:
    """Plasticity of a network on one batch: every registered metric that applies to it.

    Units are seen behind modules (`nn.ReLU`) and functions (`F.relu`), not behind activations that
    are written by hand (`x * (x > 0)`) or are in fused parts (`nn.LSTM`); where none is seen at
    all, a warning says so and their tags are left out. Activations of four axes count as
    [N, C, height, width], of three as [N, T, units] or, behind an `nn.Conv1d`, as [N, C, length].
    The model is left as it was: training flags, buffers, `.grad`, hooks, torch's random state.

    The tags that every network has; more are per layer (`dormant/0/<layer>`) and of MoE layers:
        units: hidden units seen, a channel of a convolution being one.
        dead_units: of those, units that are 0 on all inputs.
        dormant/0, dormant/0.025, dormant/0.1: share, 0..1, of units whose ReDo score
            E|h_i| / mean_j E|h_j| is at most that (Sokar et al. 2023, arXiv 2302.12902, Eq. 1).
        inactive_share: share, 0..1, of units that are non-zero on less than 1 % of the inputs
            (Dohare et al. 2024, Nature 632).
        rank/effective_rank: exp of the entropy of the normalised singular values of the features
            [N, d], 1..min(N, d) (Roy and Vetterli 2007, EUSIPCO).
        rank/stable_rank_fro: |H|_F^2 / |H|_2^2 (Rudelson and Vershynin 2007, math/0503442).
        rank/srank99: singular values that are 99 % of their sum (Kumar et al., arXiv 2010.14498).
        rank/feature_rank: singular values / sqrt(N) above 0.01 (Lyle et al., arXiv 2204.09560).
        weight_norm/l2: L2 norm of all parameters; weight_norm/mean_abs: mean |w| (Dohare et al.).
        grad_norm/l2: L2 norm of the gradient of the mean cross entropy; grad_norm/zero_share:
            share, 0..1, of its entries that are exactly 0. With labels only.
        entk_effective_rank: exp of the entropy of the tangent kernel's eigenvalues, 1..samples
            (SPHERE, arXiv 2605.04712). With `kernel_samples` only.

    Args:
        model: any network of torch modules; of a DDP wrapper its `module`. A compiled one is run
            without its graph.
        inputs: [N, ...], on the model's device. Ranks are at most N: take more than features.
        labels: [N] int class indices of a classifier with logits [N, C]. None: no gradients.
        classifier: the module whose inputs are the features; by default the last linear map,
            convolution or MoE layer in module order.
        kernel_samples: inputs, the first ones, whose tangent kernel is taken; 0 for none. Costs
            a gradient of each and their memory (4 bytes per parameter and sample).

    Raises:
        UserError: no module of the model can be taken as its classifier, or a negative
            `kernel_samples`.
        ValueError: an empty batch, logits not [N, C], or a classifier that was not called.
        NumericError: the loss, an activation or a gradient is not finite.
    """
    if kernel_samples < 0:
        raise UserError(f"kernel_samples {kernel_samples} must be at least 0; 0 takes no kernel")
    classifier = output_layer(model) if classifier is None else classifier
    with _uncompiled(model):
        probe = take_probe(model, inputs, labels, classifier=classifier, functional=True)
    values = measure_all(probe) | _units(probe)
    if kernel_samples:
        with _uncompiled(model):
            values["entk_effective_rank"] = entk_effective_rank(model, inputs, kernel_samples)
    return values


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run compiled modules as they were written: hooks see nothing of a graph."""
    compiled = any(
        hasattr(part, "_orig_mod") or part._compiled_call_impl is not None
        for part in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _units(probe: Probe) -> dict[str, float]:
    """Hidden units that were seen, and how many are dead; where there is none, a warning."""
    if not probe.activations:
        warnings.warn(
            "no hidden unit was seen: the network has no activation module (nn.ReLU) and calls no "
            "activation function (F.relu); dormant shares are left out. Use one of them where the "
            "activation is written by hand",
            stacklevel=3,
        )
        return {}
    activity = torch.cat([mean_activity(h) for h in probe.activations.values()])
    return {"units": float(len(activity)), "dead_units": float((activity == 0).sum())}

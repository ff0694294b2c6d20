"""Norms of weights, features and gradients, and the figures of routers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from dynmoe.moe.diagnostics import expert_use
from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.probes import ExpertProbe, Probe
from dynmoe.registry import PartConfig


class Norms(Metric, name="norms", source="ours; mean |w| from Dohare et al. 2024 (Nature 632)"):
    """Weight and gradient norms per net, layer, expert and expert age; distance from the start.

    All norms are L2, not divided by the number of entries, over all parameters (biases too). A
    layer is the module that owns the parameter. Gradients are of the mean loss, before clipping.
        weight_norm/l2, weight_norm/l2/<layer>, weight_norm/l2/<MoE layer>/expert_<e>
        weight_norm/mean_abs: mean |w|, Dohare et al. 2024 (Nature 632).
        weight_norm/distance_to_init: over the parameters whose value at the start is known.
        grad_norm/l2, grad_norm/l2/<layer>, grad_norm/l2/<MoE layer>/expert_<e>
        grad_norm/layer_min, grad_norm/layer_mean, grad_norm/layer_max: over layers.
        grad_norm/zero_share: share of gradient entries that are exactly 0, in 0..1.
        grad_norm/expert_age_<a>: mean over the experts that are `a` growths older than the newest.
    An expert's norm joins its hidden units' incoming and outgoing weights, no biases. Why by age:
    new units get weaker gradients than old ones (arXiv 2605.15435).
    """

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    def measure(self, probe: Probe) -> dict[str, float]:
        """Norms of weights, gradients and experts."""
        return {
            **_weights(probe),
            **_gradients(probe.gradients),
            **_experts(probe.experts),
        }


def expert_norms(
    w_in: Tensor | None, w_out: Tensor, segment: Tensor, num_experts: int
) -> list[float]:
    """L2 norm per expert of w_in [H, D_in] (if any) and w_out [D_out, H] over the units it owns."""
    squares = w_out.double().square().sum(dim=0)
    if w_in is not None:
        squares += w_in.double().square().sum(dim=1)
    total = squares.new_zeros(num_experts).index_add_(0, segment.long(), squares)
    return total.sqrt().tolist()


def _weights(probe: Probe) -> dict[str, float]:
    weights = probe.parameters
    if not weights:
        return {}
    norms = _l2(weights)
    size = sum(w.numel() for w in weights.values())
    absolute = torch.stack([w.abs().sum(dtype=torch.double) for w in weights.values()]).sum()
    values = {"weight_norm/l2": _join(norms.values())}
    values["weight_norm/mean_abs"] = float(absolute) / size
    values |= {f"weight_norm/l2/{name}": n for name, n in _by_layer(norms).items()}
    born = probe.initial or {}
    moved = {name: w - born[name].to(w) for name, w in weights.items() if name in born}
    if moved:
        values["weight_norm/distance_to_init"] = _join(_l2(moved).values())
    return values


def _gradients(gradients: dict[str, Tensor]) -> dict[str, float]:
    if not gradients:
        return {}
    norms = _l2(gradients)
    layers = _by_layer(norms)
    zeros = torch.stack([(g == 0).sum() for g in gradients.values()]).sum()
    return {
        "grad_norm/l2": _join(norms.values()),
        "grad_norm/layer_min": min(layers.values()),
        "grad_norm/layer_mean": sum(layers.values()) / len(layers),
        "grad_norm/layer_max": max(layers.values()),
        "grad_norm/zero_share": float(zeros) / sum(g.numel() for g in gradients.values()),
        **{f"grad_norm/l2/{name}": n for name, n in layers.items()},
    }


def _experts(experts: dict[str, ExpertProbe]) -> dict[str, float]:
    values: dict[str, float] = {}
    by_age: dict[int, list[float]] = defaultdict(list)
    for name, x in experts.items():
        count = x.gates.shape[1]
        weights = expert_norms(x.weight_in, x.weight_out, x.segment, count)
        values |= {f"weight_norm/l2/{name}/expert_{e}": n for e, n in enumerate(weights)}
        if x.weight_out_grad is None:  # a frozen bank
            continue
        grads = expert_norms(x.weight_in_grad, x.weight_out_grad, x.segment, count)
        values |= {f"grad_norm/l2/{name}/expert_{e}": n for e, n in enumerate(grads)}
        for age, norm in zip((x.created.max() - x.created).tolist(), grads, strict=True):
            by_age[age].append(norm)
    ages = {f"grad_norm/expert_age_{a}": sum(n) / len(n) for a, n in sorted(by_age.items())}
    return values | ages


def _l2(tensors: dict[str, Tensor]) -> dict[str, float]:
    """L2 norm of each tensor, accumulated in float64 and read back from the device at once."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.double) for t in tensors.values()]
    return dict(zip(tensors, torch.stack(norms).tolist(), strict=True))


def _by_layer(norms: dict[str, float]) -> dict[str, float]:
    """Norms of parameters joined by the module that owns them ("model" for the root's own)."""
    layers: dict[str, list[float]] = defaultdict(list)
    for name, norm in norms.items():
        layers[name.rpartition(".")[0] or "model"].append(norm)
    return {name: _join(parts) for name, parts in layers.items()}


def _join(norms: Iterable[float]) -> float:
    """The norm of a concatenation, from the norms of its parts."""
    return math.hypot(*norms)


class RouterUse(Metric, name="router"):
    """Router sharpness, balance, load of the most, least loaded and newest expert, dead experts.

    The figures of `dynmoe.moe.diagnostics.expert_use` on the probe batch, as `router/entropy` and
    so on. With several MoE layers the plain tags are means over layers, and each layer has its own
    with `/<layer>` appended.
    """

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    def measure(self, probe: Probe) -> dict[str, float]:
        """Means over MoE layers, and values per layer if there are several."""
        layers = {name: expert_use(e.gates, e.created) for name, e in probe.experts.items()}
        if not layers:
            return {}
        keys = next(iter(layers.values())).keys()
        values = {f"router/{k}": sum(u[k] for u in layers.values()) / len(layers) for k in keys}
        if len(layers) > 1:
            values |= {f"router/{k}/{name}": u[k] for name, u in layers.items() for k in keys}
        return values

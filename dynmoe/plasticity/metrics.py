"""The plasticity metrics: dormant units, ranks, norms, figures of routers.

A new metric is a class here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import NumericError
from dynmoe.moe.diagnostics import entropy, expert_use, gate_shares
from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.probes import ExpertProbe, Probe
from dynmoe.registry import PartConfig


class Dormant(
    Metric,
    name="dormant",
    source="Sokar et al. 2023 (arXiv 2302.12902), Eq. 1; Dohare et al. 2024 (Nature 632)",
):
    """Share of dormant hidden units: ReDo's score (2302.12902) and Dohare's firing rate.

    Tags, each over all units and, with `/<layer>` appended, per layer; all in 0..1:
        dormant/<tau>: units with ReDo score <= tau (Sokar et al. 2023, arXiv 2302.12902, Eq. 1).
        dormant_routed/<tau>: the same for expert units only, each judged on the samples its expert
            serves (see `routed_activity`).
        inactive_share: units that are non-zero on less than 1 % of the inputs (Dohare et al. 2024,
            Nature 632, incremental CIFAR-100). Not comparable with the above.

    |h| is used whatever the activation function. For tanh or sigmoid the score is blind to
    saturation, and for those as for GELU, SiLU and leaky ReLU outputs are hardly ever exactly
    zero, so `inactive_share` stays near 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the dormant-unit metric."""

        taus: tuple[float, ...] = (0.0, 0.025, 0.1)
        """thresholds on ReDo's score"""
        firing_rate: float = 0.01
        """a unit that is non-zero on a smaller share of inputs is inactive"""

    def measure(self, probe: Probe) -> dict[str, float]:
        """Ratios over all units and per layer; nothing for a net without activation modules."""
        scores = {n: redo_scores(mean_activity(h)) for n, h in probe.activations.items()}
        routed = {n: redo_scores(routed_activity(e)) for n, e in probe.experts.items()}
        values: dict[str, float] = {}
        for tau in self.config.taus:
            values |= _shares(f"dormant/{tau:g}", {n: s <= tau for n, s in scores.items()})
            values |= _shares(f"dormant_routed/{tau:g}", {n: s <= tau for n, s in routed.items()})
        rates = {n: firing_rate(h) for n, h in probe.activations.items()}
        idle = {n: rate < self.config.firing_rate for n, rate in rates.items()}
        return values | _shares("inactive_share", idle)


def redo_scores(activity: Tensor) -> Tensor:
    """ReDo's s_i = E|h_i| / (mean over the layer's units of E|h_j| + 1e-9): `[units] -> [units]`.

    Source: Sokar et al. 2023 (arXiv 2302.12902), Eq. 1; the 1e-9 from the authors' code.
    """
    return activity / (activity.mean() + 1e-9)


def mean_activity(h: Tensor) -> Tensor:
    """E|h_i| over samples and positions, [units] float64; see `sample_axes`.

    Positions of an image are added up in float32: all of it in float64 takes four times as long.
    """
    if h.ndim >= 4:
        h = h.abs().flatten(2).mean(dim=2, dtype=torch.promote_types(h.dtype, torch.float32))
    return h.abs().mean(dim=sample_axes(h), dtype=torch.double)


def firing_rate(h: Tensor) -> Tensor:
    """Share of inputs (and positions) on which a unit is not exactly zero, [units] float64."""
    return torch.count_nonzero(h, dim=sample_axes(h)).double() * h.shape[unit_axis(h)] / h.numel()


def sample_axes(h: Tensor) -> tuple[int, ...]:
    """All axes of h but the units': h is [N, C, height, width] with units C, or [N, ..., units]."""
    return tuple(axis for axis in range(h.ndim) if axis != unit_axis(h))


def unit_axis(h: Tensor) -> int:
    """1 of [N, C, height, width] (channels), else the last."""
    return 1 if h.ndim >= 4 else h.ndim - 1


def routed_activity(expert: ExpertProbe) -> Tensor:
    """E|h_j| of each hidden unit over the samples where its owner's gate share > 1/E, [H] float64.

    An expert without such a sample (E = 1, uniform gates, a starved expert) is judged on all
    samples. The comparison has a slack of 1e-6, so that rounding can't split uniform gates.
    """
    shares = gate_shares(expert.gates)
    served = shares * shares.shape[1] > 1 + 1e-6
    served |= ~served.any(dim=0)
    weights = served.double() / served.sum(dim=0)
    return (expert.hidden.abs().double() * weights[:, expert.segment]).sum(dim=0)


def _shares(tag: str, marks: dict[str, Tensor]) -> dict[str, float]:
    """Share of marked units over all layers under `tag`, and per layer under `tag/<layer>`."""
    if not marks:
        return {}
    units = [len(mark) for mark in marks.values()]
    counts = torch.stack([mark.sum() for mark in marks.values()]).tolist()
    layers = {f"{tag}/{n}": c / u for n, c, u in zip(marks, counts, units, strict=True)}
    return {tag: sum(counts) / sum(units), **layers}


class Rank(
    Metric,
    name="rank",
    source="Kumar et al. 2021 (arXiv 2010.14498); Rudelson and Vershynin 2007 (arXiv math/0503442);"
    " Roy and Vetterli 2007 (EUSIPCO); Lyle et al. 2022 (arXiv 2204.09560)",
):
    """Ranks of the features and of the experts' hidden units: srank, stable, effective, feature.

    Tags, for the features that enter the classifier and, with `/<layer>.hidden` appended, for the
    whole pool of each MoE layer:
        rank/srank99, rank/stable_rank_fro, rank/effective_rank, rank/feature_rank
    and `rank/effective_rank/<layer>/expert_<e>` for each expert's own units.

    All are computed from the singular values of H [N, d], neither centred nor scaled, in float64,
    and are at most min(N, d): take N >= d probes, else the batch and not the network bounds them.
    They are 0 for all-zero features.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the rank metric."""

        eps: float = 0.01
        """feature_rank counts singular values / sqrt(N) above this"""

    def measure(self, probe: Probe) -> dict[str, float]:
        """Four ranks of the features and of each pool, one of each expert."""
        values = self._ranks(singular_values(probe.features), len(probe.features), "")
        for name, expert in probe.experts.items():
            hidden = expert.hidden
            values |= self._ranks(singular_values(hidden), len(hidden), f"/{name}.hidden")
            for e in range(expert.gates.shape[1]):
                sigma = singular_values(hidden[:, expert.segment == e])
                values[f"rank/effective_rank/{name}/expert_{e}"] = effective_rank(sigma)
        return values

    def _ranks(self, sigma: Tensor, samples: int, suffix: str) -> dict[str, float]:
        return {
            f"rank/srank99{suffix}": srank99(sigma),
            f"rank/stable_rank_fro{suffix}": stable_rank_fro(sigma),
            f"rank/effective_rank{suffix}": effective_rank(sigma),
            f"rank/feature_rank{suffix}": feature_rank(sigma, samples, self.config.eps),
        }


def singular_values(h: Tensor) -> Tensor:
    """Singular values of h [N, d], descending, [min(N, d)] float64 on the CPU.

    Roots of the eigenvalues of `h^T h` (or `h h^T`) in float64, in half the time of a singular
    value decomposition. Those below the rounding of float32, 1e-7 of the largest, are 0.
    Decomposed on h's device, read back once: the ranks then cost no further synchronisation, and
    need no cumulative sum on CUDA, which torch refuses in deterministic mode.
    """
    squares = gram_eigenvalues(h)
    floor = 1e-14 * squares[0] if len(squares) else 0.0
    return torch.where(squares > floor, squares, 0.0).sqrt()


def gram_eigenvalues(h: Tensor) -> Tensor:
    """Squared singular values of h [N, d], descending, [min(N, d)] float64 on the CPU.

    Raises:
        NumericError: h holds a value that is not finite.
    """
    h = h.double()
    gram = h.T @ h if h.shape[0] >= h.shape[1] else h @ h.T
    try:
        return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0).cpu()
    except torch.linalg.LinAlgError as error:  # without a look at h first, which would wait for it
        raise NumericError("the rank of features that are not finite is not defined") from error


def srank99(sigma: Tensor) -> float:
    """Smallest k with sum_{i<=k} sigma_i >= .99 sum sigma, of sigma [k]; 0 if all are 0.

    Source: srank_delta with delta = .01, Kumar et al. 2021 (arXiv 2010.14498). Code of
    loss-of-plasticity papers calls it "stable rank". A slack of 1e-12 settles ties.
    """
    total = sigma.sum()
    below = sigma.cumsum(0) < (0.99 - 1e-12) * total
    return float(below.sum() + 1) if total > 0 else 0.0


def stable_rank_fro(sigma: Tensor) -> float:
    """The classical stable rank |H|_F^2 / |H|_2^2, in 1..min(N, d), of sigma [k]; 0 if all are 0.

    Source: Rudelson and Vershynin 2007 (arXiv math/0503442), "numerical rank".
    """
    relative = sigma / sigma.max() if sigma.numel() and sigma.max() > 0 else torch.zeros_like(sigma)
    return float(relative.square().sum())


def effective_rank(sigma: Tensor) -> float:
    """exp(-sum p log p) with p = sigma / sum sigma, of sigma [k]; 0 if all are 0.

    Within 1..min(N, d), the features being [N, d].

    Source: Roy and Vetterli 2007 (EUSIPCO), "The effective rank".
    """
    total = sigma.sum()
    return float(entropy(sigma / total).exp()) if total > 0 else 0.0


def feature_rank(sigma: Tensor, samples: int, eps: float = 0.01) -> float:
    """Number of sigma_i(H) / sqrt(N) above eps, of sigma [k]. Not scale-free.

    Source: Lyle et al. 2022 (arXiv 2204.09560), "feature rank".
    """
    return float((sigma / samples**0.5 > eps).sum())


class ExpertFeatures(
    Metric, name="expert-features", source="Luo et al. 2026 (arXiv 2605.04712), SPHERE"
):
    """Effective rank of the experts' hidden units, each times its expert's gate.

    `expert_features/effective_rank` is `exp(-sum_i p_i log p_i)`, p the eigenvalues of the Gram
    matrix `Phi^T Phi / N` [H, H] divided by their sum, within 1..min(N, H) and 0 for all-zero
    features. Phi [N, H] is what the `sphere` loss spreads out; the paper's stand-in for the rank of
    the tangent kernel. `rank/effective_rank/<layer>.hidden` differs: it leaves out the gates and
    takes singular values, not their squares. With several MoE layers the plain tag is the mean over
    layers, and each layer has its own with `/<layer>` appended.
    """

    def measure(self, probe: Probe) -> dict[str, float]:
        """The mean over MoE layers, and values per layer if there are several."""
        tag = "expert_features/effective_rank"
        return over_layers({n: {tag: weighted_rank(e)} for n, e in probe.experts.items()})


def weighted_rank(expert: ExpertProbe) -> float:
    """exp of the entropy of the Gram matrix's normalised eigenvalues; see `ExpertFeatures`."""
    features = expert.hidden.double() * expert.gates.double()[:, expert.segment]
    return effective_rank(gram_eigenvalues(features))


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

    def measure(self, probe: Probe) -> dict[str, float]:
        """Norms of weights, gradients and experts."""
        return _weights(probe) | _gradients(probe.gradients) | _experts(probe.experts)


def expert_norms(w_in: Tensor | None, w_out: Tensor, segment: Tensor, experts: int) -> list[float]:
    """L2 norm per expert of w_in [H, D_in] (if any) and w_out [D_out, H] over the units it owns."""
    squares = w_out.double().square().sum(dim=0)
    if w_in is not None:
        squares += w_in.double().square().sum(dim=1)
    total = squares.new_zeros(experts).index_add_(0, segment.long(), squares)
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
    by_age = defaultdict(list)
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

    def measure(self, probe: Probe) -> dict[str, float]:
        """Means over MoE layers, and values per layer if there are several."""
        layers = {name: expert_use(e.gates, e.created) for name, e in probe.experts.items()}
        return over_layers(
            {name: {f"router/{k}": v for k, v in use.items()} for name, use in layers.items()}
        )


def over_layers(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each tag's mean over MoE layers, and if there are several its values as `tag/<layer>`."""
    if not layers:
        return {}
    tags = next(iter(layers.values()))
    values = {tag: sum(own[tag] for own in layers.values()) / len(layers) for tag in tags}
    if len(layers) > 1:
        values |= {f"{tag}/{name}": own[tag] for name, own in layers.items() for tag in tags}
    return values

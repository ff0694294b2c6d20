"""Ranks of features: of layers, and of what experts say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.probes import ExpertProbe, Probe
from dynmoe.plasticity.routing import entropy
from dynmoe.registry import PartConfig


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

    def __init__(self, config: Config) -> None:
        self.config = config

    def measure(self, probe: Probe) -> dict[str, float]:
        """Four ranks of the features and of each pool, one of each expert."""
        values = self._ranks(probe.features, "")
        for name, expert in probe.experts.items():
            values |= self._ranks(expert.hidden, f"/{name}.hidden")
            for e in range(expert.gates.shape[1]):
                sigma = singular_values(expert.hidden[:, expert.segment == e])
                values[f"rank/effective_rank/{name}/expert_{e}"] = effective_rank(sigma)
        return values

    def _ranks(self, h: Tensor, suffix: str) -> dict[str, float]:
        sigma = singular_values(h)
        return {
            f"rank/srank99{suffix}": srank99(sigma),
            f"rank/stable_rank_fro{suffix}": stable_rank_fro(sigma),
            f"rank/effective_rank{suffix}": effective_rank(sigma),
            f"rank/feature_rank{suffix}": feature_rank(sigma, len(h), self.config.eps),
        }


def singular_values(h: Tensor) -> Tensor:
    """Singular values of h [N, d], descending, [min(N, d)] float64 on the CPU.

    Decomposed on h's device, read back once: the ranks then cost no further synchronisation, and
    need no cumulative sum on CUDA, which torch refuses in deterministic mode.
    """
    return torch.linalg.svdvals(h.double()).cpu()


def srank99(sigma: Tensor) -> float:
    """Smallest k with sum_{i<=k} sigma_i >= .99 sum sigma; 0 if all are 0.

    Source: srank_delta with delta = .01, Kumar et al. 2021 (arXiv 2010.14498). Code of
    loss-of-plasticity papers calls it "stable rank". A slack of 1e-12 settles ties.
    """
    total = sigma.sum()
    below = sigma.cumsum(0) < (0.99 - 1e-12) * total
    return float(below.sum() + 1) if total > 0 else 0.0


def stable_rank_fro(sigma: Tensor) -> float:
    """The classical stable rank |H|_F^2 / |H|_2^2, within 1..min(N, d); 0 if all are 0.

    Source: Rudelson and Vershynin 2007 (arXiv math/0503442), "numerical rank".
    """
    relative = sigma / sigma.max() if sigma.numel() and sigma.max() > 0 else torch.zeros_like(sigma)
    return float(relative.square().sum())


def effective_rank(sigma: Tensor) -> float:
    """exp(-sum p log p) with p = sigma / sum sigma, within 1..min(N, d); 0 if all are 0.

    Source: Roy and Vetterli 2007 (EUSIPCO), "The effective rank".
    """
    total = sigma.sum()
    return float(entropy(sigma / total).exp()) if total > 0 else 0.0


def feature_rank(sigma: Tensor, samples: int, eps: float = 0.01) -> float:
    """Number of sigma_i(H) / sqrt(N) above eps. Not scale-free.

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

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    def measure(self, probe: Probe) -> dict[str, float]:
        """The mean over MoE layers, and values per layer if there are several."""
        tag = "expert_features/effective_rank"
        layers = {name: weighted_rank(expert) for name, expert in probe.experts.items()}
        if not layers:
            return {}
        values = {tag: sum(layers.values()) / len(layers)}
        if len(layers) > 1:
            values |= {f"{tag}/{name}": value for name, value in layers.items()}
        return values


def weighted_rank(expert: ExpertProbe) -> float:
    """exp of the entropy of the Gram matrix's normalised eigenvalues; see `ExpertFeatures`."""
    features = expert.hidden.double() * expert.gates.double()[:, expert.segment]
    sigma = singular_values(features)
    return effective_rank(torch.square(sigma))

"""How many directions the router-weighted features of the experts use."""

from __future__ import annotations

import torch

from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.metrics.rank import effective_rank, singular_values
from dynmoe.plasticity.probes import ExpertProbe, Probe
from dynmoe.registry import PartConfig


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

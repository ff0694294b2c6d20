"""Units that hardly fire."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.plasticity.metric import Metric
from dynmoe.plasticity.probes import ExpertProbe, Probe
from dynmoe.plasticity.routing import gate_shares
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

    def __init__(self, config: Config) -> None:
        self.config = config

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
    """E|h_i| over samples and positions, [units] float64; see `sample_axes`."""
    return h.abs().mean(dim=sample_axes(h), dtype=torch.double)


def firing_rate(h: Tensor) -> Tensor:
    """Share of inputs (and positions) on which a unit is not exactly zero, [units] float64."""
    return (h != 0).mean(dim=sample_axes(h), dtype=torch.double)


def sample_axes(h: Tensor) -> tuple[int, ...]:
    """All axes but the unit axis: axis 1 of [N, C, height, width] (channels), else the last."""
    unit = 1 if h.ndim >= 4 else h.ndim - 1
    return tuple(axis for axis in range(h.ndim) if axis != unit)


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

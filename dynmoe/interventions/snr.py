"""Self-normalised resets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import UnitLayer, find_units, renewed, watch
from dynmoe.registry import PartConfig

EXPANSION = 2
"""a threshold grows by this factor at most when it is estimated anew"""
FINE = 1.05
"""ratio of two bin edges of the histogram, where gaps are long"""


@dataclass
class FiringRecord:
    """What is known of a layer's U units; gaps fall into B bins."""

    age: Tensor
    """[U] int64, steps since the unit last fired"""
    gaps: Tensor
    """[U, B] int64, histogram of the steps from one firing to the next"""
    threshold: Tensor
    """[U] int64, the age beyond which a unit is reset"""


class SNR(
    Intervention, name="snr", source="Farias & Jozefiak 2024 (arXiv 2410.20098), Algorithm 1"
):
    """Self-normalised resets: draws units afresh that have been silent for longer than they use to.

    A unit fires in a step if any activation in the batch is above 0. Its threshold is the quantile
    of the gaps between its own firings, estimated anew every `period` steps; it may shrink to any
    value then, and at most double. A unit silent for more steps than that gets fresh incoming
    weights, outgoing weights 0 and new optimizer moments; that ends a gap as a firing does. Gaps
    are counted over a unit's whole life, in bins that are exact up to 20 steps and 5 % wide beyond
    (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of self-normalised resets."""

        quantile: float = 0.99
        """share of a unit's gaps that its threshold covers"""
        period: int = 16
        """optimizer steps between two estimates"""
        limit: int = 20_000
        """largest threshold, in steps; units that never fired are reset then"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 < config.quantile < 1:
            raise UserError(f"snr: quantile={config.quantile} must be between 0 and 1")
        if config.period < 1:
            raise UserError(f"snr: period={config.period} must be at least 1")
        if config.limit < 1:
            raise UserError(f"snr: limit={config.limit} must be at least 1")

    def begin(self) -> None:
        """Find the units, and look on as they act."""
        self.layers = find_units(self.model)
        self.edges = bin_edges(self.config.limit)
        self.records = [self._new_record(layer) for layer in self.layers]
        self.fired: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers):
            watch(layer, number, self._see)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count, estimate when it is time, and reset."""
        for number, fired in self.fired.items():
            layer, record = self.layers[number], self.records[number]
            self.count(record, fired, record.age + 1)
            if self.steps % self.config.period == 0:
                self.estimate(record)
            silent = record.age > record.threshold
            index = silent.nonzero().flatten()
            if len(index):
                self.count(record, silent, record.age)
                layer.draw_incoming(index, self.generator)
                layer.silence(index)
                layer.restart_moments(index, self.optimizer)
        self.fired.clear()

    def count(self, record: FiringRecord, ends: Tensor, gap: Tensor) -> None:
        """Note the gaps [U] of the units where one ends [U] bool; the others grow older."""
        bins = torch.bucketize(gap, self.edges.to(gap.device)).clamp(max=len(self.edges) - 1)
        record.gaps.scatter_add_(1, bins.unsqueeze(1), ends.long().unsqueeze(1))
        record.age = torch.where(ends, 0, gap)

    def estimate(self, record: FiringRecord) -> None:
        """Move the thresholds to the quantiles of the gaps; without gaps they double."""
        total = record.gaps.sum(dim=1, keepdim=True)
        covered = record.gaps.cumsum(dim=1) >= self.config.quantile * total
        quantile = self.edges.to(total.device)[covered.long().argmax(dim=1)]
        most = (EXPANSION * record.threshold).clamp(max=self.config.limit)
        record.threshold = torch.where(total[:, 0] > 0, torch.minimum(quantile, most), most)

    def grown(self, before: dict[str, Tensor]) -> None:
        """Units that a growth has drawn or copied start their record anew."""
        for layer, record in zip(self.layers, self.records, strict=True):
            new, empty = renewed(layer, self.model, before), self._new_record(layer)
            for name, start in vars(empty).items():
                values = getattr(record, name)
                start[: len(values)] = values
                fresh = vars(self._new_record(layer))[name]
                where = new.view(-1, *[1] * (start.dim() - 1))
                setattr(record, name, torch.where(where, fresh, start))

    def state(self) -> dict[str, Any]:
        """The records."""
        return {"records": [_copied(asdict(record)) for record in self.records]}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the records back."""
        pairs = zip(state["records"], self.layers, strict=True)
        self.records = [
            FiringRecord(**_copied(saved, layer.incoming[0].parameter.device))
            for saved, layer in pairs
        ]

    def _new_record(self, layer: UnitLayer) -> FiringRecord:
        age = torch.zeros(layer.units, dtype=torch.long, device=layer.incoming[0].parameter.device)
        gaps = age.new_zeros(layer.units, len(self.edges))
        return FiringRecord(age, gaps, torch.full_like(age, self.config.limit))

    def _see(self, number: int, activations: Tensor) -> None:
        self.fired[number] = (activations > 0).any(dim=0)


def bin_edges(limit: int) -> Tensor:
    """[B] int64: the longest gap of each bin, 1, 2, 3, ... and then 5 % apart, up to `limit`."""
    edges = [1]
    while edges[-1] < limit:
        edges.append(min(max(edges[-1] + 1, int(edges[-1] * FINE)), limit))
    return torch.tensor(edges)


def _copied(record: dict[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """Copies of a record's tensors."""
    return {name: value.clone().to(device or value.device) for name, value in record.items()}

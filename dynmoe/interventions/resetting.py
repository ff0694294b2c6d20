"""Interventions that re-initialise units by their utility or age: continual backprop, ReDo, SNR."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynmoe.interventions.intervention import Intervention, Limit, late
from dynmoe.interventions.units import (
    Slot,
    UnitLayer,
    find_units,
    full_precision,
    refuse_frozen,
    renewed,
    watch,
)
from dynmoe.moe import UnitBank
from dynmoe.registry import PartConfig


class UnitReset(Intervention):
    """Base: hidden units are looked at as training runs them, and re-initialised when due.

    Layers that are frozen, or read by a frozen one, are left alone while they are.

    Attributes:
        layers: of hidden units.
        seen: number of a layer -> what `look` gave for it since the latest `clear()`, together for
            all passes of a step (gradient accumulation, or a layer that is called twice).
    """

    by_batch = True

    def begin(self) -> None:
        """Find the units, and look on as they act.

        Raises:
            UserError: no layer of hidden units is found, or all are left alone.
        """
        self.layers = find_units(self.model)
        refuse_frozen(self.layers, self.name)
        self.seen: dict[int, Any] = {}
        self._passes: dict[int, int] = {}
        for number, layer in enumerate(self.layers):
            watch(layer, number, self._see, partial(self._looks, layer))

    @abstractmethod
    def look(self, activations: Tensor) -> Any:
        """What to keep of a pass's activations [rows, U]."""

    def join(self, before: Any, now: Any, share: float) -> Any:
        """What several passes show together, by default their mean, in which `now` has this share.

        `before` and `now` are what `look` gives, such as [U].
        """
        return before.lerp(now, share)

    def due(self) -> bool:
        """Whether to look at the step that comes."""
        return True

    def reset(self, layer: UnitLayer, index: Tensor) -> None:
        """Give the units `index` [n] fresh incoming weights, outgoing ones 0, and new moments."""
        layer.draw_incoming(index, self.generator)
        layer.silence(index)
        layer.restart_moments(index, self.optimizer)

    def _looks(self, layer: UnitLayer) -> bool:
        return self.due() and not layer.frozen

    def _see(self, number: int, activations: Tensor) -> None:
        look = self.look(activations)
        if number not in self.seen:
            self.seen[number], self._passes[number] = look, 1
            return
        self._passes[number] += 1
        self.seen[number] = self.join(self.seen[number], look, 1 / self._passes[number])


class RecordedReset(UnitReset):
    """Base: a record is kept of each layer's units, a dataclass with tensors [U, ...]."""

    def begin(self) -> None:
        """Find the units, and begin their records."""
        super().begin()
        self.records = [self.new_record(layer) for layer in self.layers]

    @abstractmethod
    def new_record(self, layer: UnitLayer) -> Any:
        """The record of units of which nothing is known."""

    def grown(self, before: dict[str, Tensor]) -> None:
        """Units that a growth has drawn or copied start their record again."""
        for layer, record in zip(self.layers, self.records, strict=True):
            new = renewed(layer, self.model, before)
            for name, fresh in vars(self.new_record(layer)).items():
                if isinstance(fresh, Tensor):
                    values = getattr(record, name)
                    values = torch.cat([values, fresh[len(values) :]])
                    where = new.view(-1, *[1] * (fresh.dim() - 1))
                    setattr(record, name, torch.where(where, fresh, values))

    def state(self) -> dict[str, Any]:
        """The records."""
        return {"records": [_copied(vars(record)) for record in self.records]}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the records back."""
        for saved, layer, record in zip(state["records"], self.layers, self.records, strict=True):
            vars(record).update(_copied(saved, layer.incoming[0].parameter.device))


def _copied(record: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A record with copies of its tensors."""
    return {
        name: value.clone().to(device or value.device) if isinstance(value, Tensor) else value
        for name, value in record.items()
    }


@dataclass
class UnitRecord:
    """What is known of a layer's U units."""

    age: Tensor
    """[U] float, optimizer steps since the unit was drawn"""
    mean: Tensor
    """[U] running mean activation, not corrected for its start at 0"""
    utility: Tensor
    """[U] running contribution utility, not corrected either"""
    due: float = 0.0
    """units that should have been replaced and have not been yet"""


class CBP(
    RecordedReset, name="cbp", source="Dohare et al. 2024 (Nature 632, 768-774), Algorithm 1, Eq. 1"
):
    """Continual backpropagation: all the time, re-initialises a few of the least useful units.

    A unit's utility is a running average of mean |activation| times the sum of its outgoing
    |weights|. Of the units older than `maturity`, a share `rate` per step is replaced, those of
    lowest utility first: fresh incoming weights, outgoing weights 0. Optimizer moments of their
    weights restart; the step counts are the tensors' and go on, unlike in the authors' own Adam.
    """

    limits: ClassVar = {"rate": Limit.SHARE, "maturity": Limit.AT_LEAST_0, "decay": Limit.BELOW_1}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of continual backpropagation."""

        rate: float = 1e-4
        """share of the mature units that is replaced per optimizer step"""
        maturity: int = 100
        """optimizer steps before which a unit is not replaced"""
        decay: float = 0.99
        """of the running averages"""
        compensate_bias: bool = True
        """hand a replaced unit's mean activation over to the biases of what read it"""

    @torch.no_grad()
    def after_step(self) -> None:
        """Count, and replace what is due."""
        for number, (mean, size) in self.seen.items():
            self.update(self.layers[number], self.records[number], mean, size)
        self.seen.clear()

    def update(self, layer: UnitLayer, record: UnitRecord, mean: Tensor, size: Tensor) -> Tensor:
        """Take a batch's mean activation and mean |activation| [U]; returns units replaced [n]."""
        decay = self.config.decay
        sizes = ((slot, full_precision(slot.parameter.detach()).abs()) for slot in layer.outgoing)
        reach = sum(slot.unit_major(weights).sum(dim=1) for slot, weights in sizes)
        record.age += 1
        record.mean.lerp_(mean, 1 - decay)
        record.utility.lerp_(size * reach, 1 - decay)
        mature = record.age > self.config.maturity
        count = int(mature.sum())
        record.due += self.config.rate * count
        number = min(int(record.due), count)
        record.due -= number
        if not number:
            return torch.empty(0, dtype=torch.long)
        utility = record.utility / (1 - decay**record.age)
        order = utility.masked_fill(~mature, float("inf")).argsort(stable=True)
        self.replace(layer, record, order[:number])
        return order[:number]

    def replace(self, layer: UnitLayer, record: UnitRecord, index: Tensor) -> None:
        """Re-initialise the units `index` [n]."""
        if self.config.compensate_bias:
            mean = record.mean[index] / (1 - self.config.decay ** record.age[index])
            for slot in layer.outgoing:
                move_to_bias(slot, index, mean)
        self.reset(layer, index)
        for values in (record.age, record.mean, record.utility):
            values[index] = 0.0

    def new_record(self, layer: UnitLayer) -> UnitRecord:
        """All zeros; in float32 at least, as in bfloat16 an age would stop at 256."""
        zeros = full_precision(torch.zeros(layer.units).to(layer.incoming[0].parameter))
        return UnitRecord(zeros, zeros.clone(), zeros.clone())

    def look(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean activation and mean |activation| [U]."""
        return activations.mean(dim=0), activations.abs().mean(dim=0)

    def join(self, before: Any, now: Any, share: float) -> tuple[Tensor, ...]:
        """Both means [U]."""
        return tuple(a.lerp(b, share) for a, b in zip(before, now, strict=True))


def move_to_bias(slot: Slot, index: Tensor, mean: Tensor) -> None:
    """Add what the units `index` [n] send out on average to the biases of what reads them.

    Args:
        mean: [n] mean activations. Layers without biases are passed over: those in front of batch
            normalisation, which takes any shift away. So are frozen biases.
    """
    if (bias := slot.bias) is None or not bias.requires_grad:
        return
    weight = slot.parameter.index_select(slot.axis, slot.entries(index)).movedim(slot.axis, 0)
    weight = weight.flatten(2).sum(dim=2) if weight.dim() > 2 else weight  # [n * repeat, out]
    sent = weight * mean.to(weight).repeat_interleave(slot.repeat).unsqueeze(1)
    if bias.dim() == 1:
        bias.add_(sent.sum(dim=0))
    elif isinstance(slot.module, UnitBank):  # a row per expert, behind the same gate as its units
        bias.index_add_(0, slot.module.segment[index], sent)


class ReDo(UnitReset, name="redo", source="Sokar et al. 2023 (arXiv 2302.12902), Algorithm 1"):
    """Re-initialises dormant units, silent at first.

    A unit's score is its mean |activation| over the mean of its layer (Eq. 1), on the latest
    training batch; feature maps are averaged over their positions. Units with a score of at most
    tau get fresh incoming weights and outgoing weights 0, and restart their optimizer moments.
    """

    limits: ClassVar = {"tau": Limit.BELOW_1, "period": Limit.AT_LEAST_1}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of ReDo."""

        tau: float = 0.1
        """largest score of a dormant unit; 0 for units that never fire"""
        period: int = 100
        """optimizer steps between two recyclings"""

    def too_late(self, tasks: float, steps: int) -> str | None:
        """The first recycling has to come."""
        return late("period", self.config.period, steps)

    def after_step(self) -> None:
        """Recycle when it is time."""
        if self.steps % self.config.period == 0:  # after the step that `due` announced
            for number, activity in self.seen.items():
                self.recycle(self.layers[number], activity)
            self.seen.clear()

    def recycle(self, layer: UnitLayer, activity: Tensor) -> Tensor:
        """Re-initialise the dormant units of a layer; returns their numbers [n].

        Args:
            activity: [U] mean |activation| of each unit.
        """
        score = activity / (activity.mean() + 1e-9)
        dormant = (score <= self.config.tau).nonzero().flatten()
        if len(dormant):
            self.reset(layer, dormant)
        return dormant

    def due(self) -> bool:
        """Whether units are recycled after the step that comes."""
        return (self.steps + 1) % self.config.period == 0

    def look(self, activations: Tensor) -> Tensor:
        """Mean |activation| [U]."""
        return activations.abs().mean(dim=0)


EXPANSION = 2
"""a threshold grows by this factor at most when it is estimated again"""
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
    RecordedReset, name="snr", source="Farias & Jozefiak 2024 (arXiv 2410.20098), Algorithm 1"
):
    """Self-normalised resets: re-initialises units that are silent for longer than they use to be.

    A unit fires in a step if any activation in the batch is above 0. Its threshold is the quantile
    of the gaps between its own firings, estimated again every `period` steps; it may shrink to any
    value then, and at most double. A unit silent for more steps than that gets fresh incoming
    weights, outgoing weights 0 and new optimizer moments; that ends a gap as a firing does. Gaps
    are counted over a unit's whole life, in bins that are exact up to 20 steps and 5 % wide beyond
    (our choice).
    """

    limits: ClassVar = {
        "quantile": Limit.INSIDE_0_1,
        "period": Limit.AT_LEAST_1,
        "limit": Limit.AT_LEAST_1,
    }

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of self-normalised resets."""

        quantile: float = 0.99
        """share of a unit's gaps that its threshold covers"""
        period: int = 16
        """optimizer steps between two estimates"""
        limit: int = 20_000
        """largest threshold, in steps; units that never fired are reset then"""

    def begin(self) -> None:
        """Lay out the histograms' bins, find the units, and begin their records."""
        self.edges = bin_edges(self.config.limit)
        super().begin()

    @torch.no_grad()
    def after_step(self) -> None:
        """Count, estimate when it is time, and reset."""
        for number, fired in self.seen.items():
            layer, record = self.layers[number], self.records[number]
            self.count(record, fired, record.age + 1)
            if self.steps % self.config.period == 0:
                self.estimate(record)
            silent = record.age > record.threshold
            index = silent.nonzero().flatten()
            if len(index):
                self.count(record, silent, record.age)
                self.reset(layer, index)
        self.seen.clear()

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

    def new_record(self, layer: UnitLayer) -> FiringRecord:
        """No gaps, and the largest threshold."""
        age = torch.zeros(layer.units, dtype=torch.long, device=layer.incoming[0].parameter.device)
        gaps = age.new_zeros(layer.units, len(self.edges))
        return FiringRecord(age, gaps, torch.full_like(age, self.config.limit))

    def look(self, activations: Tensor) -> Tensor:
        """[U] bool: units that fired."""
        return (activations > 0).any(dim=0)

    def join(self, before: Tensor, now: Tensor, share: float) -> Tensor:
        """[U] bool: units that fired in any pass."""
        return before | now


def bin_edges(limit: int) -> Tensor:
    """[B] int64: the longest gap of each bin, 1, 2, 3, ... and then 5 % apart, up to `limit`."""
    edges = [1]
    while edges[-1] < limit:
        edges.append(min(max(edges[-1] + 1, int(edges[-1] * FINE)), limit))
    return torch.tensor(edges)

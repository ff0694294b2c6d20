"""Continual backpropagation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import Slot, UnitLayer, find_units, renewed, watch
from dynmoe.moe.bank import UnitBank
from dynmoe.registry import PartConfig


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
    Intervention, name="cbp", source="Dohare et al. 2024 (Nature 632, 768-774), Algorithm 1, Eq. 1"
):
    """Continual backpropagation: all the time, draws a few of the least useful units afresh.

    A unit's utility is a running average of mean |activation| times the sum of its outgoing
    |weights|. Of the units older than `maturity`, a share `rate` per step is replaced, those of
    lowest utility first: fresh incoming weights, outgoing weights 0. Optimizer moments of their
    weights restart; the step counts are the tensors' and go on, unlike in the authors' own Adam.
    """

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

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.rate <= 1:
            raise UserError(f"cbp: rate={config.rate} must be in 0 .. 1")
        if config.maturity < 0:
            raise UserError(f"cbp: maturity={config.maturity} must be at least 0")
        if not 0 <= config.decay < 1:
            raise UserError(f"cbp: decay={config.decay} must be in 0 .. 1")

    def begin(self) -> None:
        """Find the units, and look on as they act."""
        self.layers = find_units(self.model)
        self.records = [_new_record(layer) for layer in self.layers]
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        for number, layer in enumerate(self.layers):
            watch(layer, number, self._see)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count, and replace what is due."""
        for number, (mean, size) in self.seen.items():
            self.update(self.layers[number], self.records[number], mean, size)
        self.seen.clear()

    def update(self, layer: UnitLayer, record: UnitRecord, mean: Tensor, size: Tensor) -> Tensor:
        """Take a batch's mean activation and mean |activation| [U]; returns units replaced [n]."""
        decay = self.config.decay
        reach = sum(s.unit_major(s.parameter.detach().abs()).sum(dim=1) for s in layer.outgoing)
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
        """Draw the units `index` [n] afresh."""
        if self.config.compensate_bias:
            mean = record.mean[index] / (1 - self.config.decay ** record.age[index])
            for slot in layer.outgoing:
                move_to_bias(slot, index, mean)
        layer.draw_incoming(index, self.generator)
        layer.silence(index)
        layer.restart_moments(index, self.optimizer)
        for values in (record.age, record.mean, record.utility):
            values[index] = 0.0

    def grown(self, before: dict[str, Tensor]) -> None:
        """Units that a growth has drawn or copied start their record anew."""
        for layer, record in zip(self.layers, self.records, strict=True):
            new = renewed(layer, self.model, before)
            for name in ("age", "mean", "utility"):
                values = getattr(record, name)
                padded = torch.cat([values, values.new_zeros(len(new) - len(values))])
                setattr(record, name, padded.masked_fill(new, 0.0))

    def state(self) -> dict[str, Any]:
        """The records."""
        return {"records": [_copied(asdict(record)) for record in self.records]}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the records back."""
        pairs = zip(state["records"], self.layers, strict=True)
        self.records = [
            UnitRecord(**_copied(saved, layer.incoming[0].parameter.device))
            for saved, layer in pairs
        ]

    def _see(self, number: int, activations: Tensor) -> None:
        self.seen[number] = (activations.mean(dim=0), activations.abs().mean(dim=0))


def move_to_bias(slot: Slot, index: Tensor, mean: Tensor) -> None:
    """Add what the units `index` [n] send out on average to the biases of what reads them.

    Args:
        mean: [n] mean activations. Layers without biases are passed over: those in front of batch
            normalisation, which takes any shift away.
    """
    weight = slot.parameter.index_select(slot.axis, slot.entries(index)).movedim(slot.axis, 0)
    weight = weight.flatten(2).sum(dim=2) if weight.dim() > 2 else weight  # [n * repeat, out]
    sent = weight * mean.to(weight).repeat_interleave(slot.repeat).unsqueeze(1)
    bias = slot.bias
    if bias is None:
        return
    if bias.dim() == 1:
        bias.add_(sent.sum(dim=0))
    elif isinstance(slot.module, UnitBank):  # a row per expert, behind the same gate as its units
        bias.index_add_(0, slot.module.segment[index], sent)


def _new_record(layer: UnitLayer) -> UnitRecord:
    zeros = torch.zeros(layer.units).to(layer.incoming[0].parameter)
    return UnitRecord(zeros, zeros.clone(), zeros.clone())


def _copied(record: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Copies of a record's tensors."""
    return {
        name: value.clone().to(device or value.device) if isinstance(value, Tensor) else value
        for name, value in record.items()
    }

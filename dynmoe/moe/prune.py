"""Pruning experts: an MoE layer loses those that the data hardly uses.

Shapes: N samples, E experts before and K after, M most experts, H hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.diagnostics import FunctionChange, gate_shares, output_change
from dynmoe.moe.downcycle import route
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.experts.low_rank import LoRAPool
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.model import undisturbed
from dynmoe.moe.passes import StepNotes
from dynmoe.moe.router import Routing


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned layer, and what pruning did."""

    layer: MoELayer
    """the new layer; its parameters are new, so it needs a new optimizer"""
    kept: list[int]
    """the old numbers of its experts"""
    load: Tensor
    """[E] float64, each old expert's mean gate share on the data"""
    change: FunctionChange
    """of the layer's outputs on the data"""


@torch.no_grad()
def prune(layer: MoELayer, batches: Sequence[Tensor], threshold: float) -> Pruned:
    """Remove the active experts whose load on batches [..., D_in] is below a threshold.

    The kept experts' units and rows are copied; what was removed frees a place, so that the new
    layer can grow to as many experts as the old one. Where gates are scaled by the number of
    experts used, the experts' outputs are scaled to make up for the mean change of that number.

    Args:
        layer: left as it was.
        batches: inputs of the layer, routed in evaluation mode.
        threshold: share of the load in 0..1; 1 / E is an even share. The expert of largest load
            always stays. (Pruning by use: our choice of the plainest rule.)

    Raises:
        UserError: no batch, or a threshold outside 0..1.
    """
    if not batches or not 0 <= threshold <= 1:
        raise UserError(
            f"prune: {len(batches)} batches and threshold={threshold} must be at least 1 and "
            "between 0 and 1"
        )
    before = [route(layer, x) for x in batches]
    gates = [routing.real(routing.gates[:, : layer.num_experts]) for routing in before]
    load = torch.cat([gate_shares(one) for one in gates]).mean(dim=0).cpu()
    best = int(load.argmax())
    kept = [e for e, share in enumerate(load.tolist()) if share >= threshold or e == best]
    smaller = without_experts(layer, kept)
    after = [route(smaller, x) for x in batches]
    factor = _mean_scale(layer, before) / _mean_scale(smaller, after)
    if isinstance(smaller.bank, UnitBank | BottleneckBank):
        smaller.bank.output_weight().mul_(factor)
    for rows in smaller.bank.output_rows():
        rows.mul_(factor)
    change = output_change(_outputs(layer, batches), _outputs(smaller, batches))
    return Pruned(smaller, kept, load, change)


@torch.no_grad()
def without_experts(layer: MoELayer, kept: list[int]) -> MoELayer:
    """A copy of the layer with the active experts `kept` [K] only, numbered in that order.

    Everything that has one row per expert is put in that order: router rows, shifts and biases,
    creation steps, rows of the bank, state of the losses. Its `state_dict` loads into a new layer
    of as many experts and units.

    Raises:
        UserError: `kept` is empty, names an expert twice, or one that does not exist.
    """
    living = range(layer.num_experts)
    if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(living):
        raise UserError(
            f"without_experts: kept={kept} must name one or more of the experts 0 to {living[-1]}, "
            "each once"
        )
    smaller = copy.deepcopy(layer)
    others = [e for e in range(layer.max_experts) if e not in kept]
    order = torch.tensor([*kept, *others], device=layer.created.device)
    smaller.router.keep_experts(order, len(kept))
    for loss in smaller.losses:
        notes = loss.notes() if isinstance(loss, StepNotes) else []
        for tensor in (*loss.parameters(recurse=False), *loss.buffers(recurse=False), *notes):
            if tensor.shape[:1] == order.shape:
                tensor.copy_(tensor[order])
                tensor[len(kept) :] = 0  # what the removed experts left in sums and counts
    smaller.router.initial_experts = len(kept)
    smaller.created.copy_(layer.created[order])
    smaller.created[len(kept) :] = 0
    for rows in smaller.bank.expert_rows():
        rows.copy_(rows[order])
    if isinstance(smaller.bank, UnitBank):
        _keep_units(smaller.bank, order, len(kept))
    if isinstance(smaller.bank, BottleneckBank):
        smaller.bank.keep_experts(kept)
    if isinstance(smaller.bank, LoRAPool):
        smaller.bank.start_from(len(smaller.bank.segment))
    return smaller


def _keep_units(bank: UnitBank, order: Tensor, kept: int) -> None:
    """Cut the pool down to the units of the experts `order[:kept]`, which become 0..kept-1."""
    owner = order.argsort()[bank.segment]  # each unit's new owner
    units = (owner < kept).nonzero().flatten()
    for name, axis in bank.unit_axes():
        old: nn.Parameter = getattr(bank, name)
        new = nn.Parameter(old.index_select(axis, units), requires_grad=old.requires_grad)
        setattr(bank, name, new)
    bank.segment = owner[units]
    bank.initial_sizes = bank.hidden_sizes()


def _mean_scale(layer: MoELayer, routings: list[Routing]) -> float:
    """Mean of what the layer multiplies its gates by; samples that use no expert do not count."""
    scales = [torch.as_tensor(layer.scale(routing)).double().flatten() for routing in routings]
    used = torch.cat(scales)
    return float(used[used > 0].mean()) if bool((used > 0).any()) else 1.0


def _outputs(layer: MoELayer, batches: Sequence[Tensor]) -> Tensor:
    """What the layer makes of all batches in evaluation mode, flattened and joined."""
    with undisturbed(layer):
        return torch.cat([layer(x).flatten() for x in batches])

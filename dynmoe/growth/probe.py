"""The batch on which a growth is measured: how the model runs on it, and what is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe import MoELayer, UnitBank, moe_layers
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.model import undisturbed

RunModel = Callable[[nn.Module], Any]
"""Runs the model and returns what it returns, as `lambda model: model(input_ids=ids, tasks=t)`."""
Probe = RunModel | tuple[Tensor | RunModel, Tensor | None]
"""What the model runs on: inputs [N, ...] that are its only argument, or a function that runs it;
as the first of a pair with class labels [..., ] of the outputs [..., C], or None."""
MeasureShock = Callable[[Any, Any, Tensor | None], dict[str, float]]
"""(model outputs before, after, labels or None) -> named figures"""


def classification_shock(before: Any, after: Any, labels: Tensor | None) -> dict[str, float]:
    """How logits [..., C] changed: `output_change` (norm of the difference over norm before).

    Outputs may be a tensor, or a dict, dataclass or sequence: of these its `logits` count, or else
    its first tensor of floating point; without one nothing is measured. With labels [...] also
    `loss_before`, `loss_after` (nats), `accuracy_before`, `accuracy_after`.
    """
    old, new = find_logits(before), find_logits(after)
    if old is None or new is None or old.shape != new.shape:
        return {}
    change = (new - old).norm()
    shock = {"output_change": float(change / old.norm()) if change > 0 else 0.0}
    if labels is not None and labels.shape == old.shape[:-1] and not labels.is_floating_point():
        labels = labels.flatten()
        for when, outputs in (("before", old), ("after", new)):
            logits = outputs.flatten(0, -2)
            shock[f"loss_{when}"] = float(F.cross_entropy(logits, labels))
            shock[f"accuracy_{when}"] = float((logits.argmax(1) == labels).float().mean())
    return shock


def find_logits(outputs: Any) -> Tensor | None:
    """The logits in what a model returns, or its first tensor of floating point, or None.

    Of any shape; a classifier's are [B, C].
    """
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    named = getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    return next((t for t in _tensors(outputs) if t.is_floating_point() and t.dim()), None)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, dataclasses and sequences, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(outputs):
        for field in dataclasses.fields(outputs):
            yield from _tensors(getattr(outputs, field.name))


@torch.no_grad()
def observe(
    model: nn.Module, probe: Probe | None, activations: bool = True
) -> tuple[Any, dict[str, Tensor]]:
    """Outputs on the probe; and mean |activation| [H] of each MoE layer's units, by its name.

    The model is in evaluation mode meanwhile, and is left as it was. Padding does not count, and a
    layer that the model does not call has no entry.
    """
    if probe is None:
        return None, {}
    run = probe[0] if isinstance(probe, tuple) else probe
    calls: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in moe_layers(model) if activations else ():
        if isinstance(layer.bank, UnitBank | BottleneckBank):
            hook = partial(_note_activity, calls.setdefault(name, []))
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with undisturbed(model):
            outputs = model(run) if isinstance(run, Tensor) else run(model)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, {n: torch.stack(means).mean(dim=0) for n, means in calls.items() if means}


def _note_activity(
    means: list[Tensor], layer: MoELayer, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Note the mean |activation| [H] of a layer's units in a call of it."""
    bank = layer.bank
    assert isinstance(bank, UnitBank | BottleneckBank)
    units = bank.hidden if isinstance(bank, UnitBank) else bank.all_hidden
    hidden = units(layer.real_rows(*args, **named)).abs()
    means.append(hidden.transpose(0, 1).flatten(1).mean(dim=1))

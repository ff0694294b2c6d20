"""What is measured of a network on a stream: accuracy, and maps of its experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl_benchmarks.stream import ChunkDataset, standardise
from dynmoe.lab import processes
from dynmoe.lab.heat_maps import heat_map
from dynmoe.moe import moe_layers
from dynmoe.moe.diagnostics import (
    gate_shares,
    layer_inputs,
    output_similarity,
    routing_table,
    weight_similarity,
)
from dynmoe.moe.model import undisturbed
from dynmoe.plasticity.calibration import calibration, confidences


@torch.no_grad()
def accuracy(
    model: nn.Module, dataset: ChunkDataset, device: torch.device, samples: int = 0
) -> float:
    """Share of a chunk's images that the model labels right, in evaluation mode.

    Processes that share a run share the images out, and must all ask.

    Args:
        samples: look at that many evenly spaced images only; 0 for all.
    """
    index = torch.arange(len(dataset))
    if 0 < samples < len(dataset):
        index = torch.linspace(0, len(dataset) - 1, samples).long()
    own = processes.own_rows(index)
    answers = _answers(model, dataset, device, own)
    right = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in answers)
    return int(processes.summed(torch.tensor(right))) / len(index)


class Generalisation(NamedTuple):
    """What is measured of test images, in 0..1; see `dynmoe.plasticity.calibration`."""

    accuracy: float
    ece: float
    adaptive_ece: float


@torch.no_grad()
def generalisation(model: nn.Module, dataset: ChunkDataset, device: torch.device) -> Generalisation:
    """Accuracy and calibration on a chunk's images, in one pass over them.

    The calibration is over all outputs of the network.
    """
    own = processes.own_rows(torch.arange(len(dataset)))
    answers = _answers(model, dataset, device, own)
    judged = [confidences(logits, labels) for logits, labels in answers]
    parts = [torch.cat(part) for part in zip(*judged, strict=True)] or [torch.empty(0)] * 2
    confidence, right = (processes.all_rows(part) for part in parts)
    return Generalisation(int(right.sum()) / len(right), **calibration(confidence, right))


def _answers(
    model: nn.Module, dataset: ChunkDataset, device: torch.device, index: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, C] and labels [B] of a chunk's images `index`, in evaluation mode, on `device`."""
    mean, std = dataset.mean.to(device), dataset.std.to(device)
    with undisturbed(model):
        for part in index.split(512):
            images, labels = dataset.take(part)
            yield model(standardise(images.to(device), mean, std)), labels.to(device)


def expert_maps(
    model: nn.Module, images: Tensor, labels: Tensor, gates: dict[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Heat maps of every MoE layer by TensorBoard tag: uint8 [3, H, W]; none of a dense network.

    Args:
        model: in any mode; left as it was.
        images, labels: the latest task's probe.
        gates: by task, from 0, of its probe in this model, by layer name, [N, E]; the latest task's
            last.
    """
    maps: dict[str, Tensor] = {}
    latest = next(reversed(gates.values()))
    inputs = layer_inputs(model, images) if latest else {}
    layers = dict(moe_layers(model))
    for name in latest:
        layer = layers[name]
        experts = [f"expert {e}" for e in range(layer.num_experts)]
        numbers = [str(e) for e in range(layer.num_experts)]
        by_class = routing_table(latest[name], labels)
        by_task = torch.stack([gate_shares(g[name]).mean(dim=0) for g in gates.values()], dim=1)
        similar = {
            "weights": weight_similarity(layer),
            "outputs": output_similarity(layer, inputs[name], "cka"),
        }
        classes = [str(c) for c in range(by_class.shape[1])]
        maps[f"experts/class/{name}"] = heat_map(by_class, experts, classes, "load by class")
        tasks = [str(t + 1) for t in gates]
        maps[f"experts/task/{name}"] = heat_map(by_task, experts, tasks, "load by task")
        drawn = [heat_map(t, numbers, numbers, f"alike: {s}") for s, t in similar.items()]
        maps[f"experts/similarity/{name}"] = torch.cat(drawn, dim=2)
    return maps

"""Pictures of the experts at the end of a task: what each is used for, and how alike they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.lab.figures import heat_map
from dynmoe.moe import moe_layers
from dynmoe.moe.diagnostics import (
    gate_shares,
    layer_inputs,
    output_similarity,
    routing_table,
    weight_similarity,
)


def expert_maps(
    model: nn.Module, images: Tensor, labels: Tensor, gates: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Heat maps of every MoE layer by TensorBoard tag: uint8 [3, H, W]; none of a dense network.

    Args:
        model: in any mode; left as it was.
        images, labels: the latest task's probe.
        gates: of each task's probe in this model, by layer name, [N, E]; the latest task's last.
    """
    maps: dict[str, Tensor] = {}
    inputs = layer_inputs(model, images) if gates[-1] else {}
    layers = dict(moe_layers(model))
    for name in gates[-1]:
        layer = layers[name]
        experts = [f"expert {e}" for e in range(layer.num_experts)]
        numbers = [str(e) for e in range(layer.num_experts)]
        by_class = routing_table(gates[-1][name], labels)
        by_task = torch.stack([gate_shares(g[name]).mean(dim=0) for g in gates], dim=1)
        similar = {
            "weights": weight_similarity(layer),
            "outputs": output_similarity(layer, inputs[name], "cka"),
        }
        classes = [str(c) for c in range(by_class.shape[1])]
        maps[f"experts/class/{name}"] = heat_map(by_class, experts, classes, "load by class")
        tasks = [str(t + 1) for t in range(len(gates))]
        maps[f"experts/task/{name}"] = heat_map(by_task, experts, tasks, "load by task")
        drawn = [heat_map(t, numbers, numbers, f"alike: {s}") for s, t in similar.items()]
        maps[f"experts/similarity/{name}"] = torch.cat(drawn, dim=2)
    return maps

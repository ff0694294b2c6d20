"""What the experts of an adapted model do: how they are used, and how alike they are.

Shapes: E experts, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe import moe_layers, routing_stats
from dynmoe.moe.diagnostics import entropy
from dynmoe.tta.norm import MoELayerNorm


def moe_norms(model: nn.Module) -> list[tuple[str, MoELayerNorm]]:
    """(name, layer) of the MoELayerNorms, in module order: from shallow to deep."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, MoELayerNorm)]


def use_of_experts(model: nn.Module) -> dict[str, float]:
    """Means over the MoE layers of how the latest batch used the experts; empty without any.

    Returns:
        balance: entropy of the experts' loads over log E; 1 even, 0 one expert takes all.
        largest_share: load of the most loaded expert.
        used_experts: experts with more than a tenth of an even share.
        router_entropy: entropy of each sample's router probabilities over log E; 1 undecided.
    """
    stats = list(routing_stats(model).values())
    if not stats:
        return {}
    keys = {"balance": "balance", "largest_share": "load_max", "used_experts": "used_experts"}
    use = {new: sum(s[old] for s in stats) / len(stats) for new, old in keys.items()}
    routings = [layer.last_routing for _, layer in moe_layers(model) if layer.last_routing]
    certainties = [
        float(r.mean(entropy(r.probabilities.detach().double())) / r.active.sum().log())
        for r in routings
        if int(r.active.sum()) > 1 and (r.mask is None or bool(r.mask.any()))
    ]
    if certainties:
        use["router_entropy"] = sum(certainties) / len(certainties)
    return use


def similarity(experts: Tensor) -> float | None:
    """Mean cosine over all pairs of experts [E, D]; None while fewer than two have moved."""
    moved = experts[experts.norm(dim=1) > 0]
    if len(moved) < 2:
        return None
    unit = F.normalize(moved.double(), dim=1)
    cosines = unit @ unit.T
    pairs = torch.triu_indices(len(moved), len(moved), offset=1)
    return float(cosines[pairs[0], pairs[1]].mean())


@torch.no_grad()
def expert_similarity(model: nn.Module) -> list[float | None]:
    """`similarity` of each MoE layer's experts, scale and shift together, from shallow to deep."""
    return [
        similarity(torch.cat([m.experts_weight, m.experts_bias], dim=1)[: m.layer.num_experts])
        for _, m in moe_norms(model)
    ]

"""Local routing consistency: do neighbouring steps of a sequence use the same experts?

Where they do, few experts at a time need to be at hand, and what an expert is for shows in
stretches of text, images or play. The two figures are those of "Not All Models Suit Expert
Offloading" (Liang et al. 2025, arXiv 2505.16056); the sources at hand give them in words, the
formulas are our reading.

Shapes: T steps of one sequence in order (tokens, or steps of an episode), E experts, W segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.errors import UserError


def experts_used(gates: Tensor, k: int | None = None) -> Tensor:
    """[T, E] bool: the experts that each step uses.

    Args:
        gates: [T, E] >= 0, such as `Routing.gates` of one sequence or the gates of an RL trace.
            Where every gate is above 0, as with dense routers, give `k`.
        k: only the k largest gates of a step count, where above 0; None: all above 0.

    Raises:
        UserError: not [T, E], or k not within 1..E.
    """
    if gates.dim() != 2 or not gates.numel():
        raise UserError(f"gates must be a non-empty [T, E], got shape {list(gates.shape)}")
    if k is None:
        return gates > 0
    if not 1 <= k <= gates.shape[1]:
        raise UserError(f"k={k} must be between 1 and the {gates.shape[1]} experts")
    best = gates.topk(k, dim=1).indices
    return torch.zeros_like(gates, dtype=torch.bool).scatter(1, best, True) & (gates > 0)


def experts_chosen(trace: Tensor, experts: int) -> Tensor:
    """[T, E] bool, from a trace [T, k] of the numbers of the experts that each step uses.

    Raises:
        UserError: a number that is none of 0..E-1.
    """
    if trace.dim() != 2 or not trace.numel() or trace.min() < 0 or trace.max() >= experts:
        raise UserError(f"a trace must be a non-empty [T, k] of experts 0 to {experts - 1}")
    used = torch.zeros(len(trace), experts, dtype=torch.bool, device=trace.device)
    return used.scatter(1, trace.long(), True)


def segment_routing_performance(used: Tensor, segment: int) -> float:
    """SRP: how well one fixed group of experts can stand for the routing of a segment, in 0..1.

    A group G serves a segment with precision `hits / (segment |G|)` and recall `hits / uses`, where
    hits are the uses of experts in G; the score is the largest F1 of all groups, its mean over all
    windows of `segment` steps. 1: all steps of each segment use the same experts. The best group of
    a size holds the most used experts.

    Args:
        used: [T, E] bool, see `experts_used` and `experts_chosen`.
        segment: steps of a segment.

    Raises:
        UserError: a segment is not within 1..T steps, or no expert is ever used.
    """
    counts = _counts(used, segment)
    hits = counts.sort(dim=1, descending=True).values.cumsum(dim=1)  # [W, E] of the best groups
    size = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    scores = 2 * hits / (segment * size + counts.sum(dim=1, keepdim=True))
    return float(scores.amax(dim=1).mean())


def segment_cache_hit_rate(used: Tensor, segment: int, cache: int) -> float:
    """SCH: best share of uses whose expert is in a cache that is filled once a segment, in 0..1.

    The cache holds `cache` experts; at the start of each segment those that it uses most are put
    there. Averaged over all windows of `segment` steps, each by its uses.

    Args:
        used: [T, E] bool, see `experts_used` and `experts_chosen`.
        segment: steps of a segment.
        cache: experts that the cache holds; the paper finds twice the experts of a step enough.

    Raises:
        UserError: a segment is not within 1..T steps, no expert is ever used, or cache below 1.
    """
    counts = _counts(used, segment)
    if cache < 1:
        raise UserError(f"cache={cache} must hold at least 1 expert")
    hits = counts.topk(min(cache, counts.shape[1]), dim=1).values
    return float(hits.sum() / counts.sum())


def _counts(used: Tensor, segment: int) -> Tensor:
    """[W, E] float64, uses of each expert in every window of `segment` steps."""
    if not 1 <= segment <= len(used):
        raise UserError(f"segment={segment} must be between 1 and the {len(used)} steps")
    if not bool(used.any()):
        raise UserError("no step uses any expert; there is no routing to look at")
    total = torch.cat([torch.zeros_like(used[:1], dtype=torch.double), used.double().cumsum(0)])
    return total[segment:] - total[:-segment]

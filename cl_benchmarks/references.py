"""What a stream in time order gives away without a network: two references, tested before learnt.

Both learn as the network does: of a batch, no label is known before all its rows are predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512
"""Rows compared with their windows at once."""


def no_change(labels: Tensor, batch: int) -> Tensor:
    """Which rows the last known label is right for: bool `[N]`.

    The no-change (persistent) classifier, which shows how far labels come in blocks. Nothing is
    known of the first batch. Source: Bifet et al. 2013 (ECML PKDD), Pitfalls in benchmarking data
    stream classification, Section 4.

    Args:
        labels: int64 `[N]`, in time order.
        batch: rows whose labels become known together.
    """
    latest = torch.arange(len(labels)) // batch * batch - 1
    return (labels[latest.clamp(min=0)] == labels) & (latest >= 0)


def nearest_neighbours(
    rows: Tensor, labels: Tensor, batch: int, k: int = 5, window: int = 1000
) -> Tensor:
    """Which rows the k nearest of the latest known ones are right for: bool `[N]`.

    The most frequent label among them counts, of several the one with the nearest row. Euclidean
    distance. Nothing is known of the first batch. Source: the sliding-window kNN of Losing et al.
    2016 (ICDM), SAM-kNN, with their k and window; prequential as Gama et al. 2013 (Machine Learning
    90).

    Args:
        rows: float `[N, D]`, in time order.
        labels: int64 `[N]`.
        batch: rows whose labels become known together.
        k: neighbours; where fewer rows are known, those.
        window: latest known rows that are kept.
    """
    right = torch.zeros(len(labels), dtype=torch.bool)
    for start in range(0, len(labels), BLOCK):
        now = torch.arange(start, min(start + BLOCK, len(labels)))
        known = now // batch * batch  # rows before this one
        past = torch.arange(max(0, int(known[0]) - window), int(known[-1]))
        if len(past) == 0:
            continue
        there = (past < known[:, None]) & (past >= known[:, None] - window)
        far = torch.cdist(rows[now], rows[past]).masked_fill(~there, torch.inf)
        distance, near = far.topk(min(k, len(past)), largest=False)
        votes = distance.isfinite().float()
        votes += (votes > 0) * 0.01 / torch.arange(1, votes.shape[1] + 1)  # ties: the nearest
        scores = torch.zeros(len(now), int(labels.max()) + 1)
        scores.scatter_add_(1, labels[past[near]], votes)
        right[now] = (scores.argmax(1) == labels[now]) & (known > 0)
    return right


def online_references(
    rows: Tensor, labels: Tensor, lengths: list[int], batch: int
) -> dict[str, list[float]]:
    """Prequential accuracy of both in each window of a stream, by name: `[windows]` in 0 .. 1.

    Args:
        rows: `[N, D]`, or any shape after N.
        labels: int64 `[N]`.
        lengths: rows of each window, N in all.
        batch: rows whose labels become known together.
    """
    right = {
        "repeat last label": no_change(labels, batch),
        "5-NN, last 1000 rows": nearest_neighbours(rows.flatten(1).float(), labels, batch),
    }
    return {
        name: [float(part.float().mean()) for part in hits.split(lengths)]
        for name, hits in right.items()
    }

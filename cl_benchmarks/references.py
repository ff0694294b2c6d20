"""What a stream in time order gives away without a network: two references, tested before learnt.

Both learn as the network does: of a batch, no label is known before all its rows are predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512
"""Rows compared with their windows at once."""


def rows_known(lengths: list[int], batch: int) -> Tensor:
    """How many rows' labels are known before each row is predicted: int64 `[N]`.

    As the network's, batches begin anew in each window, whose last one may be smaller.

    Args:
        lengths: rows of each window, N in all.
        batch: rows whose labels become known together.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].repeat_interleave(torch.tensor(lengths))
    within = torch.arange(sum(lengths)) - starts
    return starts + within // batch * batch


def no_change(labels: Tensor, known: Tensor) -> Tensor:
    """Which rows the last known label is right for: bool `[N]`.

    The no-change (persistent) classifier, which shows how far labels come in blocks. Nothing is
    known of the first batch. Source: Bifet et al. 2013 (ECML PKDD), Pitfalls in benchmarking data
    stream classification, Section 4.

    Args:
        labels: int64 `[N]`, in time order.
        known: int64 `[N]`, see `rows_known`.
    """
    latest = known - 1
    return (labels[latest.clamp(min=0)] == labels) & (latest >= 0)


def nearest_neighbours(
    rows: Tensor, labels: Tensor, known: Tensor, k: int = 5, window: int = 1000
) -> Tensor:
    """Which rows the k nearest of the latest known ones are right for: bool `[N]`.

    The most frequent label among them counts, of several the one with the nearest row. Euclidean
    distance. Nothing is known of the first batch. Source: the sliding-window kNN of Losing et al.
    2016 (ICDM), SAM-kNN, with their k and window; prequential as Gama et al. 2013 (Machine Learning
    90).

    Args:
        rows: float `[N, D]`, in time order.
        labels: int64 `[N]`.
        known: int64 `[N]`, see `rows_known`.
        k: neighbours; where fewer rows are known, those.
        window: latest known rows that are kept.
    """
    right = torch.zeros(len(labels), dtype=torch.bool)
    for start in range(0, len(labels), BLOCK):
        now = torch.arange(start, min(start + BLOCK, len(labels)))
        until = known[now][:, None]
        past = torch.arange(max(0, int(until[0]) - window), int(until[-1]))
        if len(past) == 0:
            continue
        there = (past < until) & (past >= until - window)
        far = torch.cdist(rows[now], rows[past]).masked_fill(~there, torch.inf)
        distance, near = far.topk(min(k, len(past)), largest=False)
        votes = distance.isfinite().float()
        votes += (votes > 0) * 0.01 / torch.arange(1, votes.shape[1] + 1)  # ties: the nearest
        scores = torch.zeros(len(now), int(labels.max()) + 1)
        scores.scatter_add_(1, labels[past[near]], votes)
        right[now] = (scores.argmax(1) == labels[now]) & (known[now] > 0)
    return right


def online_references(
    rows: Tensor, labels: Tensor, lengths: list[int], batch: int
) -> dict[str, list[float]]:
    """Prequential accuracy of both in each window of a stream, by name: `[windows]` in 0 .. 1.

    Args:
        rows: `[N, D]`, or any shape after N.
        labels: int64 `[N]`.
        lengths, batch: see `rows_known`.
    """
    known = rows_known(lengths, batch)
    right = {
        "repeat last label": no_change(labels, known),
        "5-NN, last 1000 rows": nearest_neighbours(rows.flatten(1).float(), labels, known),
    }
    return {
        name: [float(part.float().mean()) for part in hits.split(lengths)]
        for name, hits in right.items()
    }

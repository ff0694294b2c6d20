"""What training on several processes shares about routing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether torch.distributed runs."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(counts: Tensor) -> Tensor:
    """Counts [M] without gradient, added up over all processes where torch.distributed runs.

    Every process must call it equally often. With one process it is the identity.
    """
    if not several_processes():
        return counts
    total = counts.clone()
    dist.all_reduce(total)
    return total


def join_processes(rows: Tensor) -> Tensor:
    """Rows [R, ...] without gradient of all P processes, in order of rank: [P * R, ...].

    Every process must call it equally often, with equal shapes.
    """
    if not several_processes():
        return rows
    all_rows = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(all_rows, rows.contiguous())
    return torch.cat(all_rows)

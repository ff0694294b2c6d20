"""What the tests of processes that share a run have in common: starting them, and comparing."""

from __future__ import annotations

import json
import socket

import pytest
import shared_runs
import torch
import torch.multiprocessing as mp


def spawn(folder, *checks):
    """Let two processes carry out checks in turn; what each found is in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [(check.__module__, check.__name__) for check in checks]
    mp.spawn(shared_runs.work, args=(2, port, str(folder), names), nprocs=2)
    return folder


def found(folder, check, ranks=(0, 1)):
    return [torch.load(folder / f"{check.__name__}-{rank}.pt") for rank in ranks]


def close(one, two, rel=1e-6):
    """Nested values that agree, tensors to 1e-9; texts and whole numbers exactly."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key], rel) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(
            close(*pair, rel) for pair in zip(one, two, strict=True)
        )
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.allclose(one, two, rtol=1e-9, atol=1e-9)
    if isinstance(one, float):
        return one == pytest.approx(two, rel=rel, abs=1e-3 * rel)
    return one == two


LOGGED = 1e-3
"""Logged figures are float32, and a count of exact zeros moves with the order of sums."""


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def together_and_alone(runs, check, tmp_path):
    """What rank 0 of two processes ends with, whose weights are equal, and one process alone."""
    first, second = found(runs, check)
    assert all(torch.equal(first["weights"][name], w) for name, w in second["weights"].items())
    alone = check(tmp_path)
    assert len(alone["summary"]["growth"]) == 1
    return first, alone

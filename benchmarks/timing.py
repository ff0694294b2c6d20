"""Fair timing on a shared machine: variants take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def alternate(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` per variant, taken in turn after two uncounted rounds.

    On a CPU with one torch thread this is process time, which leaves out other processes' turns.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, call in variants.items():
            _wait(device)
            began = clock()
            call()
            _wait(device)
            if turn >= 2:
                seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of name's time over base's time in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def spread(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """First and third quartile of what `ratio` is the median of; needs two rounds."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return low, high


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

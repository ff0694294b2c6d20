"""Counting right answers over a stream: in all, per domain, and in windows of batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Tally:
    """Counts.

    Args:
        names: the domains.
        window: batches that make one point of the curve.
    """

    def __init__(self, names: list[str], window: int) -> None:
        self.names, self.window = names, window
        self.correct = torch.zeros(len(names), dtype=torch.int64)
        self.seen = torch.zeros(len(names), dtype=torch.int64)
        self.curve: list[float] = []
        self._open = [0, 0, 0]  # right answers, images and batches of the window under way

    def add(self, logits: Tensor, labels: Tensor, domains: Tensor) -> bool:
        """Count a batch: logits [B, classes], labels [B], domains [B].

        Returns:
            whether it closed a window, whose accuracy then is the last of `curve`.
        """
        right = logits.argmax(dim=1).cpu() == labels
        self.correct += torch.bincount(domains[right], minlength=len(self.names))
        self.seen += torch.bincount(domains, minlength=len(self.names))
        self._open = [self._open[0] + int(right.sum()), self._open[1] + len(right),
                      self._open[2] + 1]  # fmt: skip
        if self._open[2] < self.window:
            return False
        self.curve.append(self._open[0] / self._open[1])
        self._open = [0, 0, 0]
        return True

    @property
    def accuracy(self) -> float:
        """Share of right answers among all images so far (micro average)."""
        return int(self.correct.sum()) / max(int(self.seen.sum()), 1)

    def domains(self) -> dict[str, dict[str, float]]:
        """Per domain: images seen, and the share of right answers."""
        counts = zip(self.names, self.seen.tolist(), self.correct.tolist(), strict=True)
        return {name: {"images": n, "accuracy": c / n} for name, n, c in counts if n}

    def state_dict(self) -> dict[str, Any]:
        """All counts; plain values."""
        return {"correct": self.correct.tolist(), "seen": self.seen.tolist(),
                "curve": list(self.curve), "open": list(self._open)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.correct, self.seen = torch.tensor(state["correct"]), torch.tensor(state["seen"])
        self.curve, self._open = list(state["curve"]), list(state["open"])

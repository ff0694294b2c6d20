"""What is left of old tasks: the accuracy matrix, forgetting, backward and forward transfer.

Definitions are those of Avalanche's evaluation plugins (Lomonaco et al. 2021, arXiv 2104.00405), of
accuracy. All accuracies are shares in 0..1, on the same test images of a task whenever it is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_benchmarks.measuring import accuracy
from cl_benchmarks.protocol import Protocol
from cl_benchmarks.stream import ChunkDataset
from dynmoe.lab.heat_maps import heat_map


@dataclass
class AccuracyMatrix:
    """Accuracies on the test images of each of T tasks as training went on; tasks from 0."""

    before: list[float]
    """[T] of the network before any training; empty as long as that is not measured"""
    after: list[list[float | None]]
    """[i][j], of T entries each: after task i on task j; None for tasks beyond the next one"""

    def old_accuracy(self, task: int) -> float | None:
        """Mean accuracy, after a task, on all tasks before it; None after the first."""
        return _mean([_known(a) for a in self.after[task][:task]])

    def forgetting(self, task: int) -> float | None:
        """Mean over earlier tasks k of R[k][k] - R[task][k]; None after the first task."""
        lost = [_known(self.after[k][k]) - _known(self.after[task][k]) for k in range(task)]
        return _mean(lost)

    def backward_transfer(self) -> float | None:
        """The negative of forgetting after the latest task."""
        lost = self.forgetting(len(self.after) - 1)
        return None if lost is None else -lost

    def forward_transfer(self) -> float | None:
        """Mean over tasks k >= 1 of R[k-1][k] minus the accuracy on k before any training."""
        later = range(1, len(self.after))
        return _mean([_known(self.after[k - 1][k]) - self.before[k] for k in later])

    def table(self) -> Tensor:
        """[1 + tasks done, T] for a heat map: before training, then after each task; nan gaps."""
        rows: list[list[float | None]] = [[*self.before], *self.after]
        return torch.tensor([[math.nan if a is None else a for a in row] for row in rows])

    def picture(self) -> Tensor:
        """The heat map of `table()`, uint8 [3, H, W]."""
        names = [str(task + 1) for task in range(len(self.before))]
        rows = ["start", *names[: len(self.after)]]
        return heat_map(self.table(), rows, names, "accuracy after a task (row) on a task (column)")


class OldTasks:
    """Asks a network about the tasks of a stream: all before training, then old ones and the next.

    After task i that is i + 2 tasks of `samples` images each: cheap for tens of tasks.

    Args:
        test: the test images of each task.
        samples: evenly spaced images of each; 0 for all.
        device: the model's.
    """

    def __init__(self, test: list[ChunkDataset], samples: int, device: torch.device) -> None:
        self.test, self.samples, self.device = test, samples, device
        self.matrix = AccuracyMatrix([], [])

    def start(self, model: nn.Module) -> None:
        """Measure the network before any training."""
        self.matrix.before = [self._accuracy(model, task) for task in range(len(self.test))]

    def task_done(self, model: nn.Module) -> None:
        """Measure the network after the next task of the stream."""
        tasks, asked = len(self.test), len(self.matrix.after) + 2
        row = [self._accuracy(model, task) for task in range(min(asked, tasks))]
        self.matrix.after.append([*row, *[None] * (tasks - len(row))])

    def _accuracy(self, model: nn.Module, task: int) -> float:
        return accuracy(model, self.test[task], self.device, self.samples)


def can_ask(protocol: Protocol, test: list[ChunkDataset]) -> bool:
    """Whether there is anything to forget: labels that stay, and test images that differ."""
    return protocol.no_old_tasks() is None and any(not _alike(test[0], one) for one in test)


def _alike(one: ChunkDataset, other: ChunkDataset) -> bool:
    """Whether two tasks have the same test images, with the same labels and looks."""
    if one.style != other.style or (one.pixels is None) != (other.pixels is None):
        return False
    pairs = [(one.index, other.index), (one.labels, other.labels)]
    if one.pixels is not None and other.pixels is not None:
        pairs.append((one.pixels, other.pixels))
    return all(torch.equal(a, b) for a, b in pairs)


def _known(value: float | None) -> float:
    assert value is not None  # old tasks and the next one are always asked
    return value


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

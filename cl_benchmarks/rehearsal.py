"""More gradient steps per batch on streams in time order: on rows of late, which a learner keeps.

A row is seen once by the test, but one step on it teaches a network little. A nearest-neighbour
classifier over a sliding window keeps as many rows; with rehearsal a network may do the same.
"""

from __future__ import annotations

from typing import Any

import torch

from cl_benchmarks.stream import ChunkDataset, standardise
from dynmoe import seeding


class Rehearsal:
    """Avalanche plugin: after the step on a new batch, further steps on rows drawn from the latest.

    The prediction that counts, and what triggers see, are of the first step, on new rows. The clock
    counts batches. Draws depend on the seed and the clock, so that nothing is saved to resume.
    Source: experience replay (Chaudhry et al. 2019, arXiv 1902.10486), from a sliding window.

    Args:
        steps: further steps per batch.
        rows: in each of them, drawn with replacement.
        window: latest rows to draw from, those of the batch at hand among them.
        train: the stream's chunks, in time order.
        others: plugins that act in further steps, too, such as an intervention's.
        seed: the run's.
    """

    def __init__(
        self,
        steps: int,
        rows: int,
        window: int,
        train: list[ChunkDataset],
        others: list[Any],
        seed: int,
    ) -> None:
        self.steps, self.rows, self.window, self.seed = steps, rows, window, seed
        self.others = others
        self.first = train[0]
        self.index = torch.cat([chunk.index for chunk in train])
        self.labels = torch.cat([chunk.labels for chunk in train])
        lengths = torch.tensor([0] + [len(chunk) for chunk in train])
        self.starts: list[int] = lengths.cumsum(0).tolist()

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """The step on the new batch is done."""
        position = strategy.position
        start, end = self.starts[position.task : position.task + 2]
        seen = min(start + position.batch * strategy.train_mb_size, end)
        key = ("rehearsal", strategy.clock.train_iterations)
        generator = seeding.generator(self.seed, *key)
        before = strategy.mbatch, strategy.mb_output, strategy.loss
        for _step in range(self.steps):
            low = max(0, seen - self.window)
            drawn = torch.randint(low, seen, (self.rows,), generator=generator)
            self._step(strategy, drawn)
        strategy.mbatch, strategy.mb_output, strategy.loss = before

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _step(self, strategy: Any, drawn: torch.Tensor) -> None:
        """One gradient step on the rows `[rows]` of the stream, as the trainer takes it."""
        first, device = self.first, strategy.device
        images = standardise(first.images[self.index[drawn]], first.mean, first.std)
        labels = self.labels[drawn].to(device)
        strategy.mbatch = [images.to(device), labels, torch.zeros_like(labels)]
        strategy.optimizer.zero_grad()
        strategy.mb_output = strategy.forward()
        strategy.loss = strategy.criterion()
        self._call(strategy, "before_backward")
        strategy.loss.backward()
        self._call(strategy, "after_backward")
        strategy.optimizer_step()
        self._call(strategy, "after_update")

    def _call(self, strategy: Any, hook: str) -> None:
        for plugin in self.others:
            act = getattr(plugin, hook, None)
            if act is not None:
                act(strategy)

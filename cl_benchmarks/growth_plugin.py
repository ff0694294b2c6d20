"""Growth as an Avalanche plugin, for any Avalanche strategy that trains by gradient steps."""

from __future__ import annotations

from typing import Any

import torch

from dynmoe.growth.controller import GrowthController, Probe
from dynmoe.growth.trigger import Signals

PROBE_SAMPLES = 512


class GrowthPlugin:
    """Asks a `GrowthController` at each task start and before each optimizer step.

    Not after the step: experts that come after a task's last step would be judged untrained, and
    after the run's last step for nothing. The probe batch, for unit utilities and the growth shock,
    is drawn from the present task; at a task start, from the one before.
    Avalanche has synchronised its optimizer by the time `before_training_exp` runs; growth keeps
    the optimizer in step itself, and refreshes Avalanche's record of it afterwards.

    Args:
        controller: grows `strategy.model` and its optimizer.
        probe_samples: most samples in the probe batch.
    """

    def __init__(self, controller: GrowthController, probe_samples: int = PROBE_SAMPLES) -> None:
        self.controller = controller
        self.probe_samples = probe_samples
        self._dataset: Any = None  # of the task trained last

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """A task starts: with what was learnt before it as the probe."""
        previous, self._dataset = self._dataset, strategy.experience.dataset
        if getattr(strategy, "resuming", False):
            return
        starts = strategy.clock.train_exp_counter > 0
        signals = Signals(step=strategy.clock.train_iterations, task_starts=starts)
        self._step(strategy, signals, previous or self._dataset)

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        """An optimizer step comes, after those that the clock has counted."""
        self._step(strategy, Signals(step=strategy.clock.train_iterations), self._dataset)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.controller.load_state_dict(state)

    def _step(self, strategy: Any, signals: Signals, dataset: Any) -> None:
        event = self.controller.step(signals, lambda: self._probe(dataset, strategy.device))
        if event is not None:
            strategy.optimized_param_id = dict(strategy.model.named_parameters())

    def _probe(self, dataset: Any, device: torch.device) -> Probe:
        """Evenly spaced samples of an Avalanche classification dataset: [N, C, H, W], [N]."""
        count = min(self.probe_samples, len(dataset))
        index = torch.linspace(0, len(dataset) - 1, count).long().tolist()
        samples = [dataset[i] for i in index]
        images = torch.stack([sample[0] for sample in samples])
        labels = torch.tensor([int(sample[1]) for sample in samples])
        return images.to(device), labels.to(device)

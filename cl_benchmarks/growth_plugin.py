"""Growth as an Avalanche plugin, for any Avalanche strategy that trains by gradient steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dynmoe.growth import GrowthController, Signals
from dynmoe.growth.probe import Probe
from dynmoe.growth.triggers.figures import STEP_FIGURES
from dynmoe.moe.passes import several_processes
from dynmoe.plasticity.metrics import effective_rank, mean_activity, redo_scores, singular_values
from dynmoe.plasticity.probes import take_probe

PROBE_SAMPLES = 512
DORMANT_SCORE = 0.1
"""Largest ReDo score of a unit that triggers are told is dormant."""
SCORE_STEPS = 100
"""Steps over which the score, the accuracy on minibatches before they are learnt, is a mean; where
a trigger joins steps (see `RowTrigger`), so many joined ones."""
PROBE_FIGURES = {"effective_rank", "dormant"}


class GrowthPlugin:
    """Asks a `GrowthController` at each task start and before each optimizer step.

    Not after the step: experts that come after a task's last step would be judged untrained, and
    after the run's last step for nothing. The probe batch, for unit utilities and the growth shock,
    is drawn from the present task; at a task start, from the one before.
    The strategy's own forward pass runs on it, so that multi-head models get its task labels.
    Of a chunk in time order (`Chunk.in_time_order`), neither its start nor its later samples are
    known: triggers are asked before steps only, and the probe is drawn from what has come.
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
        self._latest: dict[str, float] = {}  # what the trigger needs of the latest step
        self._accuracies: list[float] = []  # of the latest minibatches, where it needs a score

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """A task starts: with what was learnt before it as the probe."""
        previous, self._dataset = self._dataset, strategy.experience.dataset
        if batch := getattr(strategy, "train_mb_size", 0):
            self.controller.trigger.count_rows(batch)
        if getattr(strategy, "resuming", False) or _in_time_order(strategy):
            return
        starts = strategy.clock.train_exp_counter > 0
        step, needs = strategy.clock.train_iterations, self.controller.trigger.needs
        figures: dict[str, Any] = dict.fromkeys(needs & (STEP_FIGURES | PROBE_FIGURES), math.nan)
        signals = Signals(step=step, task_starts=starts, **figures, **self._score())
        self._step(strategy, signals, previous or self._dataset)

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        """An optimizer step comes, after those that the clock has counted."""
        step = strategy.clock.train_iterations
        signals = Signals(step=step, **self._figures(strategy, step), **self._score())
        self._step(strategy, signals, self._known(strategy))

    def after_backward(self, strategy: Any, **_: Any) -> None:
        """Gradients are there, and not clipped yet: note what the trigger needs of them."""
        needs = self.controller.trigger.needs
        if "loss" in needs:
            self._latest["loss"] = float(strategy.loss.detach())
        if "grad_norm" in needs:
            gradients = [p.grad for p in strategy.model.parameters() if p.grad is not None]
            self._latest["grad_norm"] = float(nn.utils.get_total_norm(gradients))
        if "score" in needs:
            self._accuracies.append(_accuracy(strategy))
            del self._accuracies[: -SCORE_STEPS * self.controller.trigger.joined]

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and the figures of the latest steps."""
        return {
            "controller": self.controller.state_dict(),
            "latest": dict(self._latest),
            "accuracies": list(self._accuracies),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.controller.load_state_dict(state["controller"])
        self._latest = dict(state["latest"])
        self._accuracies = list(state["accuracies"])

    def _score(self) -> dict[str, Any]:
        """The score, also where a task starts: a jump of it there is what is to be seen."""
        if "score" not in self.controller.trigger.needs:
            return {}
        known = self._accuracies
        return {"score": sum(known) / len(known) if known else math.nan}

    def _figures(self, strategy: Any, step: int) -> dict[str, Any]:
        """What the trigger needs; nan where there is no new value."""
        needs = self.controller.trigger.needs
        figures = {name: self._latest.get(name, math.nan) for name in needs & STEP_FIGURES}
        figures |= dict.fromkeys(needs & PROBE_FIGURES, math.nan)
        trigger = self.controller.trigger
        if needs & PROBE_FIGURES and step % (trigger.every * trigger.joined) == 0:
            known = self._known(strategy)
            measured = probe_figures(strategy.model, *self._probe(known, strategy.device))
            figures |= {name: measured[name] for name in needs & PROBE_FIGURES}
        return figures

    def _known(self, strategy: Any) -> Any:
        """What a probe may be drawn from: the present task; in time order, what has come of it.

        Where that is less than a probe, the chunk before it, if there is one.
        """
        if not _in_time_order(strategy):
            return self._dataset
        position, stream = strategy.position, strategy.experience.origin_stream
        seen = position.batch * strategy.train_mb_size  # with the batch that is at hand
        if seen < self.probe_samples and position.task > 0:
            return stream[position.task - 1].dataset
        return Subset(self._dataset, range(min(seen, len(self._dataset))))

    def _step(self, strategy: Any, signals: Signals, dataset: Any) -> None:
        event = self.controller.step(signals, lambda: self._growth_probe(strategy, dataset))
        if event is not None:
            strategy.optimized_param_id = dict(strategy.model.named_parameters())

    def _growth_probe(self, strategy: Any, dataset: Any) -> Probe:
        """The strategy's own forward pass on samples of a dataset, with their task labels."""
        batch = self._samples(dataset, strategy.device)

        def run(_: nn.Module) -> Any:
            before, strategy.mbatch = strategy.mbatch, list(batch)
            try:
                return strategy.forward()
            finally:
                strategy.mbatch = before

        return run, batch[1]

    def _probe(self, dataset: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Evenly spaced samples of an Avalanche classification dataset: [N, C, H, W], [N]."""
        return self._samples(dataset, device)[:2]

    def _samples(self, dataset: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the task label of each sample, [N]; 0 in datasets that have none."""
        return evenly_spaced(dataset, self.probe_samples, device)


def evenly_spaced(dataset: Any, most: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """At most so many samples of an Avalanche classification dataset, evenly spaced.

    Returns:
        images [N, C, H, W], labels [N] and task labels [N], 0 where the dataset has none.
    """
    count = min(most, len(dataset))
    index = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    samples = [dataset[i] for i in index]
    images = torch.stack([sample[0] for sample in samples])
    labels, tasks = (
        torch.tensor([int(sample[place]) if len(sample) > place else 0 for sample in samples])
        for place in (1, 2)
    )
    return images.to(device), labels.to(device), tasks.to(device)


def _accuracy(strategy: Any) -> float:
    """Share of the batch at hand that is right; of a batch that processes share, of all of it."""
    if several_processes() and hasattr(strategy, "accuracy"):
        return float(strategy.accuracy())
    right = strategy.mb_output.detach().argmax(dim=1) == strategy.mb_y
    return float(right.double().mean())


def _in_time_order(strategy: Any) -> bool:
    """Whether the present experience is a chunk in time order; those of others are not."""
    chunk = getattr(strategy.experience, "chunk_dataset", None)
    return chunk is not None and chunk.in_time_order


def probe_figures(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """`effective_rank` of the features, and the `dormant` share of hidden units; see `Signals`.

    images [N, C, H, W] with labels [N].
    """
    probe = take_probe(model, images, labels)
    scores = torch.cat([redo_scores(mean_activity(h)) for h in probe.activations.values()])
    return {
        "effective_rank": effective_rank(singular_values(probe.features)),
        "dormant": float((scores <= DORMANT_SCORE).double().mean()),
    }

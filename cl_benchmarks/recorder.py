"""Writes a run down: online accuracy each step, plasticity metrics each epoch, a row each task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_benchmarks.board import BOARD, TASK
from cl_benchmarks.expert_probes import probe_experts
from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.lock_out import lock_out_scalars, newest_shares
from cl_benchmarks.measuring import accuracy, expert_maps, generalisation
from cl_benchmarks.settings import Config
from cl_benchmarks.stability import AccuracyMatrix, OldTasks, can_ask
from cl_benchmarks.stream import ChunkDataset, standardise
from dynmoe import seeding
from dynmoe.lab import processes
from dynmoe.lab.board import EXPERTS
from dynmoe.lab.recorder import Recorder, check_finite
from dynmoe.lab.run import Run
from dynmoe.moe import moe_layers
from dynmoe.moe.diagnostics import gate_shares, most_experts
from dynmoe.moe.model import undisturbed
from dynmoe.plasticity.kernel import entk_effective_rank
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.probes import outside_experts, take_probe
from dynmoe.plasticity.tasks import (
    expert_task_information,
    information_by_expert,
    routing_drift,
)

if TYPE_CHECKING:
    from cl_benchmarks.trainer import StreamTrainer

MOST_WATCHED = 10
"""Past tasks whose routing is followed."""


@dataclass
class TaskRow:
    """What is known of one task once it has been trained on. Accuracies are shares in 0..1."""

    train_accuracy: float
    """on all its training images, in evaluation mode, after its last epoch: trainability"""
    test_accuracy: float
    """on its test images: generalisation"""
    online_accuracy: float
    """mean accuracy of the batches before each update (Kumar et al. 2023, arXiv 2308.11958); in
    time order that of the rows, the prequential accuracy: a smaller batch counts for less"""
    num_experts: int
    """experts per MoE layer; 1 for a dense network"""
    parameters: int
    """of the whole network"""
    steps: int
    """optimizer steps taken by the end of this task"""
    ece: float | None = None
    """expected calibration error on its test images, in 0..1; None in older runs"""
    adaptive_ece: float | None = None
    """the same with bins of equal mass"""
    old_accuracy: float | None = None
    """mean accuracy on test images of all earlier tasks; None for the first, and where old tasks
    cannot be asked"""
    forgetting: float | None = None
    """mean of what was lost of it since each of these tasks was learnt; None likewise"""
    newest_share: float | None = None
    """share of the gates that the latest growth's experts have on the task's probe, a mean over MoE
    layers; None without experts, before any growth, and in tasks that are not measured"""
    newest_share_old: float | None = None
    """the same on earlier tasks' probes, their mean; None likewise, and for the first task"""
    newest_even: float | None = None
    """what that share is where all experts have the same: new experts / all experts"""
    next_oldest: float | None = None
    """with `expert_probes`: test accuracy on the next task of a linear probe of the oldest experts'
    hidden units, before anything is trained on that task; None for the last task, without experts,
    and in tasks that are not measured"""
    next_newest: float | None = None
    """the same of the latest growth's experts; None before any growth, too"""
    next_fresh: float | None = None
    """the same of as many re-initialised units"""


class TaskRecorder(Recorder):
    """Observer of a `StreamTrainer`.

    Args:
        run: where metrics, events and checkpoints go.
        config: how many images the per-epoch accuracies and metrics look at.
        steps: of the whole stream.
        state: everything to go on from.
        train, test: the chunks of the stream.
        model: the network at its start, for the distance from there.
        growth: the growth plugin, whose events are logged; None without growth.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        steps: int,
        state: Callable[[], dict[str, Any]],
        train: list[ChunkDataset],
        test: list[ChunkDataset],
        model: nn.Module,
        growth: GrowthPlugin | None,
    ) -> None:
        super().__init__(run, config.variant, steps, state)
        self.train, self.test, self.growth = train, test, growth
        self.eval_samples = config.eval_samples
        self.probe_samples, self.measure_every = config.probe_samples, config.measure_every
        self.expert_probes, self.seed = config.expert_probes, config.seed
        self.probes: dict[int, tuple[Tensor, Tensor]] = {}  # of watched tasks, and the present one
        self.watched = watched(len(train), config.measure_every)
        self.initial = outside_experts(model)
        ask = can_ask(config.protocol.build(), test)
        self.old = OldTasks(test, config.old_samples, run.device) if ask else None
        self.rows: list[TaskRow] = []
        self.gates: dict[int, dict[str, Tensor]] = {}  # of watched tasks' probes, at their ends
        self.events_logged = 0
        self.granularity = config.granularity
        run.log.use(BOARD)
        self.online_sum: Tensor
        self.online_batches: float  # of whole size, see `batch_done`
        self.loss = torch.zeros(())  # of the latest batch, nats
        self._restart_counts()

    def before_training(self, model: nn.Module) -> None:
        """Ask the network about all tasks before it learns any; call once, not upon a resume."""
        if self.old is not None:
            self.old.start(model)

    def batch_done(self, trainer: StreamTrainer) -> None:
        """Count the batch's accuracy before its update; save when it is time."""
        in_order = self.train[trainer.position.task].in_time_order
        weight = trainer.batches.whole / trainer.train_mb_size if in_order else 1
        self.online_sum = self.online_sum + weight * trainer.accuracy()
        self.online_batches += weight
        self.loss = trainer.loss.detach()
        if self.growth is not None:
            for event in self.growth.controller.events[self.events_logged :]:
                self.log_growth(event.step, asdict(event), self.granularity)
                self.events_logged += 1
        if self.run.checkpoint_due():
            self._check(trainer)
        self.step_done(trainer.clock.train_iterations, lambda: {
            "task": f"{trainer.position.task + 1}/{len(self.train)}",
            "experts": most_experts(trainer.model),
        })  # fmt: skip

    def epoch_done(self, trainer: StreamTrainer) -> None:
        """Log accuracies on samples of the task, and every plasticity metric, on its probe."""
        step = trainer.clock.train_iterations
        if trainer.position.task % self.measure_every == 0:
            self._log_epoch(trainer, step)
        if trainer.position.epoch == trainer.train_epochs:
            self._check(trainer)
            processes.check_alike(trainer.model, step)
            self.save(step)

    def _log_epoch(self, trainer: StreamTrainer, step: int) -> None:
        task, device = trainer.position.task, self.run.device
        images, labels = self._probe(task)
        probe = take_probe(
            trainer.model, images, labels, self._initial(trainer), loss=trainer.cross_entropy
        )
        right = probe.logits.argmax(dim=1) == labels
        values = {
            "epoch/train_accuracy": float(right.float().mean()),
            "epoch/test_accuracy": accuracy(
                trainer.model, self.test[task], device, self.eval_samples
            ),
            "epoch/loss": float(self.loss),
        }
        values |= measure_all(probe)
        self.run.log.scalars(step, values)
        self.run.log.show(step, {EXPERTS: float(most_experts(trainer.model))})

    def task_done(self, trainer: StreamTrainer) -> None:
        """Log and keep the task's row, and what its router and kernel look like."""
        task, model, device = trainer.position.task, trainer.model, self.run.device
        gates = self._gates_of_probes(model, task) if task % self.measure_every == 0 else {}
        tested = generalisation(model, self.test[task], device)
        row = TaskRow(
            train_accuracy=accuracy(model, self.train[task], device),
            test_accuracy=tested.accuracy,
            ece=tested.ece,
            adaptive_ece=tested.adaptive_ece,
            online_accuracy=float(self.online_sum) / (self.online_batches or 1),
            num_experts=most_experts(model),
            parameters=sum(p.numel() for p in model.parameters()),
            steps=trainer.clock.train_iterations,
            **self._old_values(model, task),
            **newest_shares(model, gates),
            **self._next_values(model, task),
        )
        self.rows.append(row)
        known = {name: value for name, value in asdict(row).items() if value is not None}
        values = {f"task/{n}": float(v) for n, v in known.items() if not n.startswith("newest_")}
        values |= lock_out_scalars(asdict(row))
        if gates:
            values |= self._log_experts(model, gates, row.steps)
        self.run.log.scalars(row.steps, values, place=task + 1)
        self.run.log.event(row.steps, "task", {"task": task + 1, **asdict(row)})
        self._restart_counts()

    def _gates_of_probes(self, model: nn.Module, task: int) -> dict[int, dict[str, Tensor]]:
        """By task, of watched ones before this one and of this one, see `_gates`."""
        tasks = [*(k for k in self.watched if k < task), task]
        return {k: _gates(model, self._probe(k)[0]) for k in tasks}

    def _log_experts(
        self, model: nn.Module, gates: dict[int, dict[str, Tensor]], step: int
    ) -> dict[str, float]:
        """Draw the maps of a task's end; returns figures of the router and the tangent kernel.

        `gates` are those of `_gates_of_probes`.
        """
        task = next(reversed(gates))
        probe = self._probe(task)
        values = {"task/entk_effective_rank": entk_effective_rank(model, probe[0][:64])}
        values |= self._router_values(gates)
        if task in self.watched:
            self.gates[task] = gates[task]
        for tag, image in expert_maps(model, *probe, gates).items():
            self.run.log.image(step, tag, image)
        if self.old is not None:
            self.run.log.image(step, f"{TASK}/matrix of tasks", self.old.matrix.picture())
        return values

    def _probe(self, task: int) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] and labels [N] of a task's probe; kept only where watched."""
        if task not in self.probes:
            self.probes = {k: probe for k, probe in self.probes.items() if k in self.watched}
            self.probes[task] = _evenly_spaced(
                self.train[task], self.probe_samples, self.run.device
            )
        return self.probes[task]

    def stability(self) -> dict[str, Any]:
        """The matrix of accuracies, forgetting and transfer, for the summary; None if not asked."""
        if self.old is None:
            names = ("accuracy_matrix", "forgetting", "backward_transfer", "forward_transfer")
            return dict.fromkeys(names)
        matrix = self.old.matrix
        return {
            "accuracy_matrix": asdict(matrix),
            "forgetting": matrix.forgetting(len(self.rows) - 1),
            "backward_transfer": matrix.backward_transfer(),
            "forward_transfer": matrix.forward_transfer(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.rows = [TaskRow(**row) for row in state["rows"]]
        self.gates = state["gates"]
        self.events_logged = state["events_logged"]
        self.online_sum = state["online_sum"]
        self.online_batches = state["online_batches"]
        self.loss = state["loss"]
        if self.old is not None:
            self.old.matrix = AccuracyMatrix(**state["accuracy_matrix"])

    def state_dict(self) -> dict[str, Any]:
        """What was counted and kept so far."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "gates": self.gates,
            "events_logged": self.events_logged,
            "online_sum": self.online_sum,
            "online_batches": self.online_batches,
            "loss": self.loss,
            "accuracy_matrix": None if self.old is None else asdict(self.old.matrix),
        }

    def _old_values(self, model: nn.Module, task: int) -> dict[str, float | None]:
        """What the network still knows of the tasks before this one, fields of its row."""
        if self.old is None:
            return {}
        self.old.task_done(model)
        matrix = self.old.matrix
        return {"old_accuracy": matrix.old_accuracy(task), "forgetting": matrix.forgetting(task)}

    def _next_values(self, model: nn.Module, task: int) -> dict[str, float]:
        """What probes of its experts know of the next task, fields of its row; {} if not asked."""
        if not self.expert_probes or task % self.measure_every or task + 1 == len(self.train):
            return {}
        generator = seeding.generator(self.seed, "expert-probes", task)
        following = self.train[task + 1], self.test[task + 1]
        return probe_experts(model, *following, generator, self.run.device)

    def _check(self, trainer: StreamTrainer) -> None:
        step = trainer.clock.train_iterations
        check_finite(trainer.model, step, "a smaller --lr or --clip 1 may help")

    def _restart_counts(self) -> None:
        self.online_sum = torch.zeros((), device=self.run.device)
        self.online_batches = 0

    def _initial(self, trainer: StreamTrainer) -> dict[str, Tensor]:
        """The first values of the parameters that still have their first shape."""
        now = dict(trainer.model.named_parameters())
        return {n: p for n, p in self.initial.items() if n in now and now[n].shape == p.shape}

    def _router_values(self, now: dict[int, dict[str, Tensor]]) -> dict[str, float]:
        """Drift on past tasks' probes, and what experts tell of the task, over tasks so far.

        `now` holds the gates of each watched task's probe, and of the latest, by task.
        """
        values: dict[str, float] = {}
        for name in next(iter(now.values())):
            past = [routing_drift(g[name], now[task][name]) for task, g in self.gates.items()]
            if past:
                values[f"router/drift/{name}"] = sum(past) / len(past)
            means = torch.stack([gate_shares(gates[name]).mean(dim=0) for gates in now.values()])
            nats, share = expert_task_information(means)
            values[f"router/task_information/{name}"] = nats
            values[f"router/task_information_share/{name}"] = share
            for expert, own in information_by_expert(means).items():
                values[f"router/task_information/{name}/expert_{expert}"] = own
        return values


def watched(tasks: int, every: int) -> list[int]:
    """Tasks from 0 whose routing later tasks look at again: ten at most of those that are measured.

    Evenly spaced, so that a stream of hundreds costs no more per task than one of ten.
    """
    measured = list(range(0, tasks, every))
    places = torch.linspace(0, len(measured) - 1, min(len(measured), MOST_WATCHED)).round().long()
    return [measured[place] for place in places.tolist()]


def _evenly_spaced(
    chunk: ChunkDataset, samples: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Evenly spaced training images of a chunk: float32 [N, C, H, W], labels [N]."""
    index = torch.linspace(0, len(chunk) - 1, min(samples, len(chunk))).long()
    images, labels = chunk.take(index)
    return standardise(images, chunk.mean, chunk.std).to(device), labels.to(device)


@torch.no_grad()
def _gates(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gates [N, E] of each MoE layer for a batch of images, by layer name; {} without such."""
    if next(moe_layers(model), None) is None:
        return {}
    with undisturbed(model):
        model(images)
        return {
            name: layer.last_routing.gates[:, : layer.num_experts].cpu()
            for name, layer in moe_layers(model)
            if layer.last_routing is not None
        }

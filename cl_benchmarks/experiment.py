"""Continual learning: a method, and those it is compared with, on one stream of tasks."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from cl_benchmarks import figures
from cl_benchmarks.expert_probes import check_probes
from cl_benchmarks.exporting import StreamExporter, horizon_of
from cl_benchmarks.figures import OLD, PANELS, has_old, tasks_of
from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.images import ImageData
from cl_benchmarks.lock_out import locked_out, tasks_with_lock_out, warn_of_lock_out
from cl_benchmarks.losses import check_loss
from cl_benchmarks.method import Horizon, ZeroHead
from cl_benchmarks.preparing import (
    attach_intervention,
    check_acts,
    check_batches,
    check_shared,
    load_trainer,
    make_trainer,
    prepare,
)
from cl_benchmarks.recorder import TaskRecorder
from cl_benchmarks.references import online_references
from cl_benchmarks.settings import Config, check_without_tasks
from cl_benchmarks.stream import chunk_datasets, make_benchmark
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.lab import inputs, torchrun
from dynmoe.lab.experiment import At, Curve, Details, Experiment, Results, Session
from dynmoe.lab.export import Exporter
from dynmoe.lab.report import print_table
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import confidence_interval, iqm, three
from dynmoe.plasticity.tasks import plasticity_summary

DATA_SEED = 0
"""Embedded images are one fixed data set, as a downloaded one is; a run's seed deals them out."""
TRANSFER = ("backward_transfer", "forward_transfer")
"""Metrics that are one number of a whole run, whatever part of it is asked for."""
CALIBRATION = ("ece", "adaptive_ece")
"""Metrics of how far confidence and accuracy on a task's test images are apart."""
OF_OLD = ("old_accuracy", "forgetting")
"""Metrics that some tasks, or all, do not have: of the first nothing can be old."""
LESS_IS_BETTER = (*CALIBRATION, "forgetting")
"""Metrics whose worst task is the one with the largest value."""
MATRIX = "test accuracy before training and after each task (rows) on each task (columns)"
"""Title of an accuracy matrix."""
NEWEST = "newest experts, now / old"
"""Heading of their shares of the gates in a run's table of tasks."""


@dataclass(frozen=True)
class ContinualLearning(Experiment):
    """What `dynmoe.cl` does. Metrics are fields of a summary's task rows."""

    command = "cl"
    on_processes = True
    least: ClassVar[dict[str, float]] = {
        "epochs": 1, "batch_size": 1, "probe_samples": 1, "eval_samples": 0, "lr": 0,
        "old_samples": 0, "measure_every": 1,
        "momentum": 0, "weight_decay": 0, "clip": 0,
    }  # fmt: skip
    metric = "train_accuracy"
    columns = (
        ("first task", "train_accuracy", "first"),
        ("last task", "train_accuracy", "last"),
        ("mean", "train_accuracy", "mean"),
        ("per task", "train_accuracy", "slope"),
        ("online", "online_accuracy", "mean"),
        ("test", "test_accuracy", "mean"),
        ("old tasks, end", "old_accuracy", "last"),
        ("forgetting", "forgetting", "last"),
        ("ECE", "ece", "mean"),
        ("ECE, ad.", "adaptive_ece", "mean"),
    )
    lesser = ("per task", "ECE", "ECE, ad.")
    legend = "online, test, ECE: mean over tasks; ECE, ad.: adaptive bins"
    references = ("dense", "fresh")
    about = ("dataset", "protocol", "access", "chunks")

    def check(self, config: Config) -> None:
        """Also what cannot work in any of the variants, such as where no task start is told."""
        super().check(config)
        for part in (config.dataset, config.protocol, config.trigger, config.intervention):
            part.build()  # before data are made: what it checks of its own options
        for one in _all_variants(config):
            check_probes(one)
        if config.protocol.build().in_time_order:
            for one in _all_variants(config):
                check_without_tasks(one)
        if torchrun.started():
            load_trainer()

    def variants(self, config: Config, shared: ImageData) -> dict[str, dict[str, Config]]:
        """The method of the settings, then each of `config.compare`.

        Raises:
            UserError: an intervention of one would do nothing in a run of this length.
        """
        own, *others = _all_variants(config)
        if any(one.intervention.part.name != "none" for one in (own, *others)):
            horizon = _horizon(config, shared)
            check_acts(own, horizon)
            for one in others:
                check_acts(one, horizon, compared=True)
        return {"": {one.variant: one for one in (own, *others)}}

    def label(self, config: Config, shared: ImageData) -> str:
        """Method and data set; it becomes part of a folder's name."""
        return f"{config.variant}-{re.sub(r'[^A-Za-z0-9._-]+', '-', shared.name).strip('-')}"

    def load(self, config: Config) -> ImageData:
        """The data set."""
        return config.dataset.build().load(DATA_SEED)

    def inputs(self, config: Config, shared: ImageData) -> dict[str, str]:
        """Images and tables, where they are files."""
        folder = getattr(config.dataset, "data_dir", None)
        images = inputs.images(shared.name, folder, shared.files)
        return images | inputs.tables(shared.tables)

    def prepare(self, run: Run, config: Config, shared: ImageData) -> StreamSession:
        """Network, optimizer, trainer and stream."""
        _check_data(run, run.restored, shared)
        return StreamSession(run, config, shared)

    def finished(self, run: Run, config: Config, shared: ImageData, now: bool) -> None:
        """The curves of the run, and of one that was trained now a table of its tasks."""
        assert run.summary is not None
        _check_data(run, run.summary, shared)
        title, label = self.title(config, shared), config.variant
        if now:
            _print_tasks(run.summary, f"{label}: {title}")
            warn_of_lock_out(run.summary["tasks"], config, label)
        own = Results({"": {label: [run.summary]}}, {}, self)
        self.draw(run.folder / "plasticity.png", own, title)

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """Of one task, or over all; the slope is the change per task, of a straight line.

        Tasks without a number are left out; nan where no task has one. `TRANSFER` is of whole runs.
        """
        if metric in TRANSFER:
            return _or_nan(summary.get(metric))
        rows = summary["tasks"]
        values = [row.get(metric) for row in rows]
        values = [value for value in values if value is not None]
        if not values:
            return math.nan
        if at in ("first", "last"):
            return values[0 if at == "first" else -1]
        if at == "worst":
            return max(values) if metric in LESS_IS_BETTER else min(values)
        return plasticity_summary(values)[at]

    def beside(self, results: Results, stream: str) -> dict[str, dict[str, Any]]:
        """On streams in time order, what needs no network; in all runs of a stream it is equal."""
        run = next(iter(results.runs[stream].values()))[0]
        return {
            name: {"tasks": [{"online_accuracy": value} for value in values]}
            for name, values in run.get("references", {}).items()
        }

    def describe(self, metric: str, at: At) -> str:
        """Such as "train accuracy, last task"."""
        where = {"mean": "mean over tasks", "worst": "worst task", "slope": "change per task"}
        return f"{metric.replace('_', ' ')}, {where.get(at, f'{at} task')}"

    def details(self, summary: dict[str, Any]) -> Details:
        """Accuracies by task, the accuracy matrix, growths, and the network's final size."""
        rows, matrix = summary["tasks"], summary.get("accuracy_matrix")
        curves = {metric: _curve(rows, metric) for metric, _ in (*PANELS, OLD)}
        table = [matrix["before"], *matrix["after"]] if matrix else []
        return Details(
            {metric: curve for metric, curve in curves.items() if curve.points},
            {MATRIX: [[_or_nan(x) for x in row] for row in table]} if table else {},
            summary["growth"],
            {"parameters": rows[-1]["parameters"]},
        )

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed and task, and intervals at the stream's ends and over all."""
        last = results.runs[stream][variant][0]["tasks"][-1]
        entry: dict[str, Any] = {"parameters": last["parameters"]}
        for metric, _ in PANELS:
            tasks = tasks_of(results, stream, variant, metric)
            entry[metric] = [[round(x, 4) for x in seed] for seed in tasks]
            # The tasks of a run are not independent: its own IQM is one value.
            entry[f"{metric}_iqm"] = three(confidence_interval([iqm(t) for t in tasks], "mean"))
            for at in ("first", "last", "mean"):
                entry[f"{metric}_{at}"] = three(results.interval(stream, variant, metric, at))
        entry |= {f"{m}_mean": three(results.interval(stream, variant, m, "mean"))
                  for m in CALIBRATION}  # fmt: skip
        if has_old(results, stream):
            entry |= _old_entry(results, stream, variant)
        return entry

    def draw(self, path: Path, results: Results, title: str) -> None:
        """A row of panels per stream, see `figures.draw`."""
        figures.draw(path, results, title, self.references)

    def summaries(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """The tasks' accuracies, one summary a seed."""
        return figures.from_entry(entry)

    def exporter(self) -> Exporter:
        """The network after the latest task."""
        return StreamExporter()

    def chance(self, config: Config, shared: ImageData) -> float:
        """One in as many as the network has outputs."""
        return 1 / config.protocol.build().num_outputs(shared, config.chunks)

    def title(self, config: Config, shared: ImageData) -> str:
        """Data set, protocol and network."""
        access = "" if config.access == "limited" else f", {config.access}"
        protocol, network = config.protocol.part.name, config.network.part.name
        return f"{shared.name}, {protocol} stream{access}, {network}"


class StreamSession(Session):
    """One method on all tasks."""

    def __init__(self, run: Run, config: Config, data: ImageData) -> None:
        self.config, self.data = config, data
        protocol = config.protocol.build()
        self.chunks = protocol.stream(data, config.chunks, config.access, config.seed)
        train, test = chunk_datasets(data, self.chunks)
        horizon = horizon_of(config, [len(chunk) for chunk in train])
        steps, outputs = horizon.steps, protocol.num_outputs(data, config.chunks)
        check_loss(config.loss_over, [chunk.labels for chunk in train], outputs, protocol.name)
        training = prepare(config, data, outputs, horizon, run.device)
        check_batches(config, training.model, [len(chunk) for chunk in train])
        check_shared(config, training.model)
        check_acts(config, horizon)
        plugins = config.method.build().plugins(config, training)
        self.growth = next((p for p in plugins if isinstance(p, GrowthPlugin)), None)
        plugins.append(attach_intervention(config, training, self.growth))
        plugins += protocol.plugins(train, plugins[-1:], config.seed)
        if protocol.resets_head:
            plugins.append(ZeroHead(training))
        self.model = training.model
        self.train = train
        self.recorder: TaskRecorder = TaskRecorder(
            run, config, steps, self.state, train, test, training.model, self.growth
        )
        self.trainer = make_trainer(config, training, plugins, self.recorder, run.device)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on within a task."""
        self.recorder.load_state_dict(state["recorder"])
        self.trainer.resume(state["trainer"])
        self.recorder.progress.start_at(state["trainer"]["clock"]["train_iterations"])

    def work(self) -> None:
        """All tasks that are left."""
        if self.trainer.position.task == 0 and not self.trainer.resuming:
            self.recorder.before_training(self.trainer.model)
        experiences = make_benchmark(self.data, self.chunks).train_stream
        for experience in list(experiences)[self.trainer.position.task :]:
            self.trainer.train(experience, eval_streams=[])

    def state(self) -> dict[str, Any]:
        """Trainer and recorder, and the data set's name."""
        return {
            "dataset": self.data.name,
            "trainer": self.trainer.state_dict(),
            "recorder": self.recorder.state_dict(),
        }

    def summary(self) -> dict[str, Any]:
        """Every task's row, and how the accuracies went over the stream."""
        config, rows = self.config, [asdict(row) for row in self.recorder.rows]
        return {
            "method": config.variant,
            "dataset": self.data.name,
            "protocol": config.protocol.part.name,
            "access": config.access,
            "seed": config.seed,
            "tasks": rows,
            "plasticity": {
                key: plasticity_summary([row[key] for row in rows])
                for key in ("train_accuracy", "test_accuracy", "online_accuracy")
            },
            "growth": [asdict(e) for e in self.growth.controller.events] if self.growth else [],
            "lock_out": tasks_with_lock_out(rows),
            **self.recorder.stability(),
            **self._references(),
        }

    def _references(self) -> dict[str, Any]:
        """Of a stream in time order: what it gives away without a network."""
        if not self.train[0].in_time_order:
            return {}
        rows, labels = zip(*(chunk.tensors() for chunk in self.train), strict=True)
        lengths = [len(chunk) for chunk in self.train]
        found = online_references(
            torch.cat(rows), torch.cat(labels), lengths, self.config.batch_size
        )
        return {"references": found}


def _check_data(run: Run, known: dict[str, Any] | None, data: ImageData) -> None:
    """Refuse a run on other data: `auto` may find another data set than it did before."""
    if known is not None and known.get("dataset", data.name) != data.name:
        raise UserError(
            f"{run.folder} holds a run on {known['dataset']}, and now the data set is "
            f"{data.name}; use another --name"
        )


def _horizon(config: Config, data: ImageData) -> Horizon:
    """How long the runs are."""
    chunks = config.protocol.build().stream(data, config.chunks, config.access, config.seed)
    return horizon_of(config, [len(chunk.train_index) for chunk in chunks])


def _all_variants(config: Config) -> list[Config]:
    """The settings, then those of each of `config.compare`."""
    # Those compared with by default leave out the method itself.
    own = config.variant if config.compare == type(config).compare else None
    return [config, *(_compared(config, name) for name in config.compare if name != own)]


def _compared(config: Config, name: str) -> Config:
    """The same settings with another method, or the dense network with an intervention."""
    if name == config.variant:
        raise UserError(f"--compare {name}: that is the main run itself; name other methods")
    own_name = f"{config.name}-{name}" if config.name else None
    method, intervention = "dense", name
    if name not in registry.names("intervention"):
        method, intervention = name, "none"
    return replace(
        config,
        method=registry.get("method", method).Config(),
        intervention=registry.get("intervention", intervention).Config(),
        compare=(),
        name=own_name,
    )


def _curve(rows: list[dict[str, Any]], metric: str) -> Curve:
    """A field of the tasks' rows by task, from 1 on."""
    values = [(number, row.get(metric)) for number, row in enumerate(rows, start=1)]
    return Curve("task", [(number, float(value)) for number, value in values if value is not None])


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _old_entry(results: Results, stream: str, variant: str) -> dict[str, Any]:
    """What is left of old tasks, for results.json."""
    entry: dict[str, Any] = {}
    for metric in OF_OLD:
        tasks = tasks_of(results, stream, variant, metric)
        entry[metric] = [[None if x is None else round(x, 4) for x in seed] for seed in tasks]
        for at in ("last", "mean"):
            entry[f"{metric}_{at}"] = three(results.interval(stream, variant, metric, at))
    return entry | {m: three(results.interval(stream, variant, m, "last")) for m in TRANSFER}


def _print_tasks(summary: dict[str, Any], title: str) -> None:
    """One row per task of a finished run."""
    headings = {"train_accuracy": "train", "test_accuracy": "test", "online_accuracy": "online"}
    if summary["tasks"][-1].get("ece") is not None:
        headings |= {"ece": "ECE", "adaptive_ece": "adaptive ECE"}
    if summary["tasks"][-1].get("old_accuracy") is not None:
        headings |= {"old_accuracy": "old tasks", "forgetting": "forgetting"}
    rows = [["task", *headings.values(), "experts", "parameters"]]
    for number, task in enumerate(summary["tasks"], start=1):
        shares = [_percent(task.get(key)) for key in headings]
        rows.append([str(number), *shares, str(task["num_experts"]), f"{task['parameters']:,}"])
    if any(task.get("newest_share") is not None for task in summary["tasks"]):
        newest = [_newest(task) for task in summary["tasks"]]
        rows = [[*row, cell] for row, cell in zip(rows, [NEWEST, *newest], strict=True)]
    print_table(title, rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _newest(task: dict[str, Any]) -> str:
    """Shares of the newest experts, of the task and of old ones; a lock-out is marked."""
    shares = [_percent(task.get(key)) for key in ("newest_share", "newest_share_old")]
    return " / ".join(filter(None, shares)) + (" (locked out)" if locked_out(task) else "")

"""Methods on a small stream, and the loop around them held against the plainest code for it."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_benchmarks.experiment import ContinualLearning, prepare
from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.images import ImageData
from cl_benchmarks.measuring import accuracy
from cl_benchmarks.method import Horizon
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import (
    Batches,
    ChunkDataset,
    Position,
    chunk_datasets,
    make_benchmark,
    standardise,
)
from dynmoe import cl
from dynmoe.errors import UserError
from dynmoe.growth import Budget
from dynmoe.lab import checkpoint
from dynmoe.lab.runner import run_one
from dynmoe.moe.model import moe_layers, undisturbed
from dynmoe.plasticity.calibration import calibration, confidences
from dynmoe.registry import get

CPU = torch.device("cpu")


def run_method(preset: str, config: Config, data: ImageData) -> tuple[Path, dict[str, Any]]:
    """One run's folder and summary."""
    done = run_one(ContinualLearning(), preset, config, data)
    return done.folder, done.summary


@pytest.fixture(scope="module")
def data() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def _config(runs: Path, method: str = "dynamicmoe", **changes: Any) -> Config:
    """3 tasks of 2 epochs of 3 batches, hidden layer of 24 units."""
    options = {key: changes.pop(key) for key in ("factor", "experts") if key in changes}
    small = replace(
        cl.presets()["smoke"],
        runs_dir=runs,
        compare=(),
        epochs=2,
        eval_samples=60,
        probe_samples=40,
        method=get("method", method).Config(**options),
        protocol=get("protocol", "shuffle").Config(images=150),
        network=get("network", "mlp").Config(width=16, hidden=24),
    )
    return replace(small, **changes)


def _last_model(folder: Path) -> dict[str, Tensor]:
    saved = checkpoint.load_latest(folder / "checkpoints")
    assert saved is not None
    return saved["state"]["trainer"]["model"]


def _chunks(config: Config, data: ImageData) -> tuple[list[ChunkDataset], list[ChunkDataset]]:
    stream = config.protocol.build().stream(data, config.chunks, config.access, config.seed)
    return chunk_datasets(data, stream)


def _train_plainly(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, chunk: ChunkDataset,
    task: int,
) -> float:  # fmt: skip
    """What training on a chunk means, with nothing around it. Returns the online accuracy."""
    right = []
    for epoch in range(config.epochs):
        position = Position(task, epoch, 0)
        for x, y in Batches(chunk, config.batch_size, config.seed, position, CPU, config.augment):
            optimizer.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            if config.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            right.append(float((logits.argmax(1) == y).float().mean()))
    return sum(right) / len(right)


def _calibration(model: nn.Module, chunk: ChunkDataset) -> list[float]:
    """Both calibration errors of a network on a chunk's images."""
    images, labels = chunk.tensors()
    with undisturbed(model):
        judged = confidences(model(standardise(images, chunk.mean, chunk.std)), labels)
    return [pytest.approx(value, abs=1e-6) for value in calibration(*judged).values()]


# ---------------------------------------------------------------- methods


def test_dense_is_plain_training(data: ImageData, tmp_path: Path) -> None:
    config = _config(tmp_path, "dense", augment="crop-flip", clip=0.7)
    folder, summary = run_method("smoke", config, data)
    training = prepare(config, data, 10, Horizon(18, 3), CPU)
    model = training.model.train()
    train, test = _chunks(config, data)
    for task, row in enumerate(summary["tasks"]):
        online = _train_plainly(config, model, training.optimizer, train[task], task)
        assert row["online_accuracy"] == pytest.approx(online, abs=1e-6)
        assert row["train_accuracy"] == accuracy(model, train[task], CPU)
        assert row["test_accuracy"] == accuracy(model, test[task], CPU)
        assert [row["ece"], row["adaptive_ece"]] == _calibration(model, test[task])
        assert row["steps"] == 6 * (task + 1)
    for name, value in _last_model(folder).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_fresh_is_training_new_networks(data: ImageData, tmp_path: Path) -> None:
    config = _config(tmp_path, "fresh")
    folder, summary = run_method("smoke", config, data)
    train, _ = _chunks(config, data)
    firsts = []
    for task, row in enumerate(summary["tasks"]):
        training = prepare(config, data, 10, Horizon(18, 3), CPU)
        model = training.new_model(task).train()
        firsts.append(model.state_dict()["classifier.weight"].clone())
        optimizer = torch.optim.Adam(model.parameters(), config.lr)
        _train_plainly(config, model, optimizer, train[task], task)
        assert row["train_accuracy"] == accuracy(model, train[task], CPU)
    for name, value in _last_model(folder).items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[1], firsts[2])


def test_reset_optimizer_clears_its_state_at_each_task(data: ImageData, tmp_path: Path) -> None:
    config = _config(tmp_path, "dense", reset_optimizer=True)
    folder, _ = run_method("smoke", config, data)
    model = prepare(config, data, 10, Horizon(18, 3), CPU).model.train()
    for task, chunk in enumerate(_chunks(config, data)[0]):
        optimizer = torch.optim.Adam(model.parameters(), config.lr)
        _train_plainly(config, model, optimizer, chunk, task)
    for name, value in _last_model(folder).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_sizes_of_the_methods(data: ImageData, tmp_path: Path) -> None:
    """Experts and parameters after each task."""

    def rows(**changes: Any) -> tuple[list[int], list[int]]:
        _, summary = run_method("smoke", _config(tmp_path, epochs=1, **changes), data)
        tasks = summary["tasks"]
        return [t["num_experts"] for t in tasks], [t["parameters"] for t in tasks]

    neck, head, width, hidden = 65 * 16, 17 * 10, 16, 24
    dense = neck + head + (width + 1) * hidden + (hidden + 1) * width
    assert rows(method="dense") == ([1, 1, 1], [dense] * 3)
    wide = dense + 2 * hidden * (2 * width + 1)
    assert rows(method="wide", factor=3) == ([1, 1, 1], [wide] * 3)

    experts, parameters = rows()
    assert experts == [2, 4, 6] and len(set(parameters)) == 1
    assert parameters[0] == dense + 5 * width + 6 * width  # 6 output biases, 6 router rows
    assert rows(granularity=1)[0] == [1, 2, 3]
    assert rows(method="moe-static") == ([6, 6, 6], parameters)
    assert rows(method="moe-static", experts=4)[0] == [4, 4, 4]

    experts, parameters = rows(budget=Budget(mode="per-growth", units=5))
    assert experts == [2, 4, 6]
    assert [b - a for a, b in pairwise(parameters)] == [2 * 5 * (2 * width + 1)] * 2
    trigger = get("trigger", "every").Config(steps=2)
    assert rows(trigger=trigger, granularity=1)[0] == [2, 3, 5]  # before steps 3, 5, 7, 9


def test_summary_and_log(data: ImageData, tmp_path: Path) -> None:
    folder, summary = run_method("smoke", _config(tmp_path), data)
    assert json.loads((folder / "summary.json").read_text()) == summary
    of_old = {"accuracy_matrix", "forgetting", "backward_transfer", "forward_transfer"}
    assert summary.keys() == of_old | {
        "method", "dataset", "protocol", "access", "seed", "tasks", "plasticity", "growth",
        "lock_out", "chance",
    }  # fmt: skip
    assert summary["chance"] == 1 / 10
    assert all(summary[name] is None for name in of_old)  # of shuffled labels nothing is left
    keys = {"train_accuracy", "test_accuracy", "online_accuracy", "num_experts", "parameters"}
    assert all(keys <= task.keys() for task in summary["tasks"])
    assert [g["step"] for g in summary["growth"]] == [6, 12]
    assert [g["hidden_sizes"]["blocks.0"] for g in summary["growth"]] == [[6] * 4, [4] * 6]
    assert all(g["shock"]["output_change"] > 0 for g in summary["growth"])

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    events = [(line["step"], line["event"]) for line in lines if "event" in line]
    assert events == [(6, "task"), (6, "growth"), (12, "task"), (12, "growth"), (18, "task")]
    epochs = [line for line in lines if "epoch/loss" in line]
    assert [line["step"] for line in epochs] == [3, 6, 9, 12, 15, 18]
    for metric in ("dormant/", "rank/", "weight_norm/", "grad_norm/", "router/", "epoch/test"):
        assert all(any(tag.startswith(metric) for tag in line) for line in epochs), metric


def test_layers_that_share_a_router_train_and_grow_over_tasks(
    data: ImageData, tmp_path: Path
) -> None:
    """The tangent kernel, measured at each task's end, leaves the shared router as it was."""
    network = get("network", "mlp").Config(width=16, hidden=24, blocks=2, place="all")
    config = _config(tmp_path, network=network, share_router=True, chunks=2, epochs=1)
    _, summary = run_method("smoke", config, data)
    assert [row["num_experts"] for row in summary["tasks"]] == [2, 4]


def test_same_seed_same_run(data: ImageData, tmp_path: Path) -> None:
    texts = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder, _ = run_method("smoke", _config(tmp_path / place, seed=seed), data)
        texts.append([(folder / name).read_bytes() for name in ("summary.json", "log.jsonl")])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[2][0] and texts[0][1] != texts[2][1]


def test_comparison(data: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each method in a run of its own; started again, nothing is trained twice."""
    config = _config(tmp_path, epochs=1, compare=("dense", "wide"), name="mine")
    cl.run(config, "smoke")
    folders = sorted(p.name for p in (tmp_path / "cl").iterdir())
    assert folders == ["mine", "mine-dense", "mine-wide"]
    for name in folders:
        assert (tmp_path / "cl" / name / "seed-0" / "plasticity.png").stat().st_size > 10_000
    assert (tmp_path / "cl" / "mine" / "seed-0" / "comparison.png").stat().st_size > 10_000
    logs = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("log.jsonl")}
    first = capsys.readouterr().out
    cl.run(config, "smoke")
    again = capsys.readouterr().out
    assert logs == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("log.jsonl")}
    assert "task" in first and again in first  # the table of methods alone
    assert again.count("digits, shuffle stream, mlp") == 1


@pytest.mark.slow
def test_seeds_are_runs_of_their_own_and_processes_change_nothing(
    data: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {}
    for jobs in (1, 2):
        runs = tmp_path / str(jobs)
        result = cl.run(_config(runs, epochs=1, method="dense", seeds=2, jobs=jobs), "smoke")
        assert ([row.seed for row in result.rows], result.model is None) == ([0, 1], jobs == 2)
        found = json.loads((result.folder / "results.json").read_text())
        ends = found["streams"][""]["dense"]["train_accuracy_last"]
        assert found["seeds"] == 2 and ends[1] < ends[0] < ends[2]
        assert "mean over 2 seeds" in capsys.readouterr().out
        texts[jobs] = [p.read_bytes() for p in sorted(runs.rglob("summary.json"))]
    assert len(texts[1]) == 2 and texts[1] == texts[2]


def test_run_on_another_data_set_is_refused(data: ImageData, tmp_path: Path) -> None:
    """`--dataset auto` may find Tiny ImageNet one day."""
    config = _config(tmp_path, epochs=1, name="x")
    run_method("smoke", config, data)
    with pytest.raises(UserError, match="holds a run on digits, and now the data set is other"):
        run_method("smoke", config, replace(data, name="other"))


# ---------------------------------------------------------------- growth in any Avalanche strategy


class _Watch:
    """Avalanche plugin behind the growth plugin: parameters right after growth and at the end."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.changed: list[dict[str, Tensor]] = []

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.start = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
        owned = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        assert owned == {id(p) for p in strategy.model.parameters()}
        steps = {int(state["step"]) for state in strategy.optimizer.state.values()}
        assert steps == ({strategy.clock.train_iterations} if self.changed else set())
        assert len(strategy.optimizer.state) == (len(owned) if self.changed else 0)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        end = dict(strategy.model.named_parameters())
        self.changed.append({n: end[n] != before for n, before in self.start.items()})


@pytest.mark.parametrize("mode", ["constant", "per-growth"])
def test_growth_in_avalanches_own_naive_strategy(mode: Any, data: ImageData) -> None:
    """Parameters that growth puts in the place of others must learn."""
    config = _config(Path("unused"), budget=Budget(mode=mode))
    training = prepare(config, data, 10, Horizon(18, 3), CPU)
    controller = config.make_controller(training.model, training.optimizer, training.generator)
    watch = _Watch()
    with warnings.catch_warnings():  # of optional solvers, and of loggers
        warnings.simplefilter("ignore")
        from avalanche.training.supervised import Naive

        naive = Naive(
            model=training.model, optimizer=training.optimizer, criterion=nn.CrossEntropyLoss(),
            train_mb_size=50, train_epochs=2, plugins=[GrowthPlugin(controller), watch],
            evaluator=None,
        )  # fmt: skip
    chunks = config.protocol.build().stream(data, 3, "limited", 0)
    for experience in make_benchmark(data, chunks).train_stream:
        naive.train(experience, eval_streams=[])

    assert [event.experts for event in controller.events] == [4, 6]
    _, layer = next(iter(moe_layers(training.model)))
    units = {"constant": [24, 24, 24], "per-growth": [24, 48, 72]}[mode]
    for task, changed in enumerate(watch.changed):
        moved = changed["blocks.0.bank.w_out"].any(dim=0)
        assert len(moved) == units[task]
        assert moved.float().mean() > 0.8  # of the units; a ReLU may be silent on this data
        assert moved[-units[task] // (2 * (task + 1)) :].any()  # those of the newest expert
        assert changed["blocks.0.router.weight"][: 2 * (task + 1)].any(dim=1).all()
    assert layer.num_experts == 6


def test_checkpoint_of_a_run_holds_plain_values_only(data: ImageData, tmp_path: Path) -> None:
    folder, _ = run_method("smoke", _config(tmp_path, epochs=1), data)
    for path in (folder / "checkpoints").glob("*.pt"):
        saved = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        assert saved["state"]["dataset"] == "digits"

"""Accuracy on old tasks: the matrix and what follows from it, and how it is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_benchmarks.experiment import ContinualLearning, _print_tasks
from cl_benchmarks.images import ImageData
from cl_benchmarks.measuring import accuracy
from cl_benchmarks.settings import Config
from cl_benchmarks.stability import AccuracyMatrix, OldTasks, can_ask
from cl_benchmarks.stream import ChunkDataset, chunk_datasets
from dynmoe import cl
from dynmoe.errors import UserError
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import Results, logged
from dynmoe.lab.report import table
from dynmoe.lab.runner import run_one
from dynmoe.registry import get

CPU = torch.device("cpu")
MATRIX = AccuracyMatrix(
    before=[0.1, 0.2, 0.3], after=[[0.9, 0.5, None], [0.6, 0.8, 0.1], [0.5, 0.7, 1.0]]
)


def test_forgetting_and_transfer_by_hand() -> None:
    assert [MATRIX.forgetting(t) for t in range(3)] == [
        None, pytest.approx(0.3), pytest.approx((0.4 + 0.1) / 2),
    ]  # fmt: skip
    assert [MATRIX.old_accuracy(t) for t in range(3)] == [None, 0.6, pytest.approx(0.6)]
    assert MATRIX.backward_transfer() == pytest.approx(-0.25)
    assert MATRIX.forward_transfer() == pytest.approx(((0.5 - 0.2) + (0.1 - 0.3)) / 2)
    alone = AccuracyMatrix([0.1], [[0.9]])
    assert alone.backward_transfer() is None and alone.forward_transfer() is None


def test_definitions_are_avalanches() -> None:
    """Its own metric classes, fed with a random matrix, give the same numbers."""
    from avalanche.evaluation.metrics import BWT, Forgetting, ForwardTransfer

    values = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).tolist()
    before, after = values[0], values[1:]
    matrix = AccuracyMatrix(before, after)
    forgetting, backward, forward = Forgetting(), BWT(), ForwardTransfer()
    for task in range(5):
        for metric in (forgetting, backward):
            metric.update(task, after[task][task], initial=True)
            metric.update(task, after[4][task])
        if task:
            forward.update(task, before[task], initial=True)
            forward.update(task, after[task - 1][task])
    old = [forgetting.result_key(k=task) for task in range(4)]  # not of the last task, as there
    assert matrix.forgetting(4) == pytest.approx(sum(old) / 4)
    old = [backward.result_key(k=task) for task in range(4)]
    assert matrix.backward_transfer() == pytest.approx(sum(old) / 4)
    assert matrix.forward_transfer() == pytest.approx(sum(forward.result().values()) / 4)


class Told(ChunkDataset):
    """Counts the images that are taken out of it."""

    taken = 0

    def take(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.taken += len(items)
        return super().take(items)


def test_only_sampled_images_of_old_tasks_and_the_next_are_looked_at(data: ImageData) -> None:
    protocol = get("protocol", "class").Config(head="full").build()
    test = chunk_datasets(data, protocol.stream(data, 4, "limited", 0))[1]
    for one in test:
        one.__class__ = Told
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 12))
    old = OldTasks(test, 7, CPU)
    old.start(model)
    assert [one.taken for one in test] == [7] * 4  # type: ignore[attr-defined]
    for _ in range(4):
        old.task_done(model)
    assert [one.taken - 7 for one in test] == [28, 28, 21, 14]  # type: ignore[attr-defined]
    assert [[a is None for a in row] for row in old.matrix.after] == [
        [False, False, True, True], [False, False, False, True], [False] * 4, [False] * 4,
    ]  # fmt: skip
    assert old.matrix.before == [accuracy(model, one, CPU, 7) for one in test]
    known = old.matrix.table().isfinite()
    assert known.shape == (5, 4) and known.sum() == 4 + 13
    assert old.matrix.picture().dtype == torch.uint8
    assert OldTasks(test, 0, CPU)._accuracy(model, 1) == accuracy(model, test[1], CPU)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("class", {"head": "full"}, True), ("class", {}, False), ("iid", {}, False),
        ("noise", {}, False), ("permuted", {"images": 40}, True), ("domains", {}, True),
        ("blurred", {"head": "full"}, True), ("warmstart", {}, False),
        ("shuffle", {"images": 40}, False),
    ],
)  # fmt: skip
def test_where_old_tasks_can_be_asked(
    name: str, options: dict[str, Any], expected: bool, data: ImageData
) -> None:
    protocol = get("protocol", name).Config(**options).build()
    test = chunk_datasets(data, protocol.stream(data, 4, "limited", 0))[1]
    assert can_ask(protocol, test) == expected
    assert not can_ask(protocol, test[:1])


def test_domains_that_are_tested_on_the_same_images_are_not_asked(data: ImageData) -> None:
    domains = torch.arange(240) % 2
    told = replace(
        data, train_domains=domains, test_domains=torch.full((60,), 2), domain_names=("a", "b", "c")
    )
    protocol = get("protocol", "domains").Config().build()
    assert not can_ask(protocol, chunk_datasets(told, protocol.stream(told, 2, "limited", 0))[1])


# ---------------------------------------------------------------- in runs


def config(runs: Path, method: str = "dense", protocol: str = "class", **options: Any) -> Config:
    """5 tasks of 2 digits each, in four epochs."""
    if protocol == "class":
        options.setdefault("head", "full")
    return replace(
        cl.presets()["smoke"],
        runs_dir=runs,
        compare=(),
        chunks=5,
        epochs=4,
        lr=0.01,
        eval_samples=20,
        probe_samples=20,
        old_samples=30,
        name=f"{method}-{protocol}",
        method=get("method", method).Config(),
        protocol=get("protocol", protocol).Config(**options),
        network=get("network", "mlp").Config(width=16, hidden=24),
    )


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def test_a_run_measures_what_its_networks_know(digits: ImageData, tmp_path: Path) -> None:
    done = run_one(ContinualLearning(), "smoke", config(tmp_path), digits)
    summary, matrix = done.summary, AccuracyMatrix(**done.summary["accuracy_matrix"])
    protocol = config(tmp_path).protocol.build()
    test = chunk_datasets(digits, protocol.stream(digits, 5, "limited", 0))[1]
    assert done.model is not None
    assert matrix.after[4] == [accuracy(done.model, one, CPU, 30) for one in test]
    assert len(matrix.before) == 5 and [len(row) for row in matrix.after] == [5] * 5
    for task, row in enumerate(summary["tasks"]):
        assert row["forgetting"] == matrix.forgetting(task)
        assert row["old_accuracy"] == matrix.old_accuracy(task)
    assert summary["forgetting"] == summary["tasks"][-1]["forgetting"] > 0.3
    assert summary["backward_transfer"] == -summary["forgetting"]
    tags = [logged(done.folder, f"task/{n}") for n in ("old_accuracy", "forgetting")]
    assert [len(values) for values in tags] == [4, 4]  # nothing is old after the first task


def test_fresh_networks_forget_everything(digits: ImageData, tmp_path: Path) -> None:
    summary = run_one(ContinualLearning(), "x", config(tmp_path, "fresh"), digits).summary
    after = summary["accuracy_matrix"]["after"]
    learnt = [after[k][k] for k in range(5)]
    assert min(learnt) > 0.5  # of two digits, in a head over ten
    assert summary["tasks"][-1]["old_accuracy"] < 0.05
    assert summary["forgetting"] == pytest.approx(sum(learnt[:4]) / 4, abs=0.05)


def test_nothing_is_measured_where_labels_change(digits: ImageData, tmp_path: Path) -> None:
    one = config(tmp_path, protocol="shuffle", images=100)
    summary = run_one(ContinualLearning(), "x", one, digits).summary
    assert summary["accuracy_matrix"] is None and summary["forward_transfer"] is None
    assert {row["forgetting"] for row in summary["tasks"]} == {None}
    value = ContinualLearning().value
    assert math.isnan(value(summary, "forgetting", "last"))
    assert math.isnan(value(summary, "backward_transfer", "last"))


# ---------------------------------------------------------------- in tables and studies


def results(old: float | None) -> Results:
    """Two variants of two seeds of three tasks; `old` is the accuracy on old tasks, or none."""

    def run(offset: float) -> dict[str, Any]:
        known = [None, old, old and old + offset]
        tasks = [
            {"train_accuracy": 0.9, "test_accuracy": 0.5, "online_accuracy": 0.4,
             "num_experts": 1, "parameters": 10, "steps": 3 * t + 3, "old_accuracy": known[t],
             "forgetting": known[t]}
            for t in range(3)
        ]  # fmt: skip
        whole = None if old is None else -offset
        return {"tasks": tasks, "backward_transfer": whole, "forward_transfer": whole}

    runs = {"dense": [run(0.1), run(0.12)], "fresh": [run(0.3), run(0.34)]}
    return Results({"s": runs}, {}, ContinualLearning())


def test_tables_and_studies_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = results(0.5)
    assert table(known, "s")[0][-2:] == ["old tasks, end", "forgetting"]
    assert table(known, "s")[1][-2].startswith("61.0")
    assert known.values("s", "dense", "old_accuracy", "first") == [0.5, 0.5]
    assert known.values("s", "dense", "backward_transfer") == [-0.1, -0.12]
    gap = known.says("s", "fresh", "dense", "forgetting", "last")
    assert "+21.0 points" in gap and "higher" in gap
    entry = known.experiment.entry(known, "s", "dense")
    assert entry["old_accuracy"] == [[None, 0.5, 0.6], [None, 0.5, 0.62]]
    assert entry["forgetting_last"][0] == 0.61 and entry["forward_transfer"][0] == -0.11
    _print_tasks(known.runs["s"]["dense"][0], "t")
    assert "forgetting" in capsys.readouterr().out


def test_tables_and_studies_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = results(None)
    assert "forgetting" not in table(lacking, "s")[0]
    assert math.isnan(lacking.difference("s", "fresh", "dense", "forgetting").point)
    assert "not measured (forgetting)" in lacking.says("s", "fresh", "dense", "forgetting")
    assert "not measured" in lacking.kept("s", "fresh", "old_accuracy")
    assert "forgetting" not in lacking.experiment.entry(lacking, "s", "dense")
    _print_tasks(lacking.runs["s"]["dense"][0], "t")
    assert "forgetting" not in capsys.readouterr().out


def test_figures_have_a_panel_more(tmp_path: Path) -> None:
    from PIL import Image

    widths = {}
    for old in (None, 0.5):
        results(old).experiment.draw(tmp_path / "f.png", results(old), "title")
        with Image.open(tmp_path / "f.png") as image:
            widths[old] = image.width
    assert widths[0.5] == pytest.approx(widths[None] * 4 / 3, abs=2)


def test_the_option_is_refused_where_nothing_is_asked() -> None:
    given = ["--old-samples", "0"]
    for protocol in ("class", "shuffle", "iid", "warmstart"):
        with pytest.raises(UserError, match=f"--old-samples has no effect: .*{protocol}"):
            parse(cl.presets(), ["--protocol", protocol, *given], "p", "d")
    for flags in (["--protocol", "domains"], ["--protocol.head", "full"]):
        assert parse(cl.presets(), [*flags, *given], "p", "d")[1].old_samples == 0
    with pytest.raises(UserError, match="--old-samples -1 is too small"):
        ContinualLearning().check(replace(cl.presets()["laptop"], old_samples=-1))

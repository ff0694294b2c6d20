"""The online protocol: time order, what is tested where, and that no boundary is told."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks.experiment import ContinualLearning, StreamSession
from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.images import ImageData
from cl_benchmarks.method import Horizon, TaskPlugin
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import Batches, ChunkDataset, Position, chunk_datasets, standardise
from dynmoe import registry
from dynmoe.cl import presets
from dynmoe.errors import UserError
from dynmoe.lab.runner import run_one

ONLINE = registry.get("protocol", "online")
WITH_TRIGGER: dict[str, Any] = {"method": registry.get("method", "dynamicmoe").Config()}


def _vectors(rows: int = 200) -> ImageData:
    x = torch.randn(rows, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0, 0, 0] > 0).long()
    return ImageData(
        name="rows", train_images=x, train_labels=y, test_images=x, test_labels=y, num_classes=2,
        in_time_order=True,
    )  # fmt: skip


def _config(**options: Any) -> Config:
    base = replace(
        presets()["laptop"],
        protocol=ONLINE.Config(),
        network=registry.get("network", "mlp").Config(width=8, hidden=16),
        method=registry.get("method", "dense").Config(),
        trigger=registry.get("trigger", "drift").Config(),
        compare=(),
        epochs=1,
        chunks=4,
        batch_size=8,
    )
    return replace(base, **options)


def test_windows_follow_each_other_and_are_tested_on_the_next() -> None:
    data = _vectors(203)
    chunks = ONLINE.Config(tail=0.1).build().stream(data, 4, "limited", 0)
    assert torch.cat([c.train_index for c in chunks]).equal(torch.arange(183))
    for now, after in pairwise(chunks):
        assert now.test_index.equal(after.train_index)
    assert chunks[-1].test_index.equal(torch.arange(183, 203))
    assert {len(c.train_index) for c in chunks} == {45, 46}


def test_rows_are_neither_shuffled_nor_scaled_and_resume_in_place() -> None:
    data = _vectors()
    train, _ = chunk_datasets(data, ONLINE.Config().build().split(data, 4, 0))
    batches = Batches(train[1], 8, 0, Position(task=1), torch.device("cpu"))
    rows = torch.cat([x for x, _ in batches])
    assert rows.equal(data.train_images[train[1].index])
    late = next(iter(Batches(train[1], 8, 0, Position(task=1, batch=3), torch.device("cpu"))))
    assert late[0].equal(rows[24:32])
    assert standardise(data.train_images, train[0].mean, train[0].std) is data.train_images


def test_order_and_protocol_must_fit(data: ImageData) -> None:
    with pytest.raises(UserError, match="online needs data in time order, and random .*stream"):
        ONLINE.Config().build().stream(data, 4, "limited", 0)
    with pytest.raises(UserError, match="iid would mix up rows.*use --protocol online"):
        registry.get("protocol", "iid").Config().build().stream(_vectors(), 4, "limited", 0)
    with pytest.raises(UserError, match="tail 1.0 must lie between"):
        ONLINE.Config(tail=1.0).build()
    with pytest.raises(UserError, match="use --access limited"):
        ONLINE.Config().build().stream(_vectors(), 4, "cumulative", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2}, "use --epochs 1"),
        ({"augment": "crop-flip"}, "use --augment none"),
        ({"reset_optimizer": True}, "--reset-optimizer acts at task starts"),
        ({"compare": ("fresh",)}, "method fresh acts at task starts.*use dense"),
        ({"compare": ("shrink-perturb",)}, "acts at task starts.*set its every"),
        ({"compare": ("replay",)}, "keeps images of earlier tasks"),
        (
            {**WITH_TRIGGER, "trigger": registry.get("trigger", "task").Config()},
            "trigger task grows at task starts.*use drift",
        ),
    ],
)
def test_what_needs_task_starts_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ContinualLearning().check(_config(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", registry.names("method"))
def test_methods_that_act_at_task_starts_say_so(name: str) -> None:
    from cl_benchmarks.experiment import prepare

    config = _config(
        method=registry.get("method", name).Config(),
        network=registry.get("network", "mlp").Config(hidden=200),
    )
    method = config.method.build()
    training = prepare(config, _vectors(), 2, Horizon(5000, 4), torch.device("cpu"))
    told = [p for p in method.plugins(config, training) if isinstance(p, TaskPlugin)]
    assert bool(told) == (method.without_tasks() is not None)


class _Asked(GrowthPlugin):
    """Notes what the trigger and the probe are told."""

    def _step(self, strategy: Any, signals: Any, dataset: Any) -> None:
        position = strategy.position
        seen = position.task * 50 + min(8 * position.batch, 50)
        self.asked.append((seen, signals.task_starts, _last_row(dataset)))
        super()._step(strategy, signals, dataset)

    asked: list[tuple[int, bool, int]]


def _last_row(dataset: Any) -> int:
    """The number of the last row of a dataset of windows of 50, told by its first feature."""
    rows = _vectors(222).train_images[:, 0, 0, 0]
    return int((rows == dataset[len(dataset) - 1][0][0, 0, 0]).nonzero())


@pytest.fixture
def session(tmp_path: Path) -> Iterator[StreamSession]:
    """A growing network on four windows of 50 rows; the plugin notes what it is asked."""
    from dynmoe.lab.run import Run

    config = _config(
        **WITH_TRIGGER,
        runs_dir=tmp_path,
        trigger=registry.get("trigger", "every").Config(steps=9),
        protocol=ONLINE.Config(tail=0.1),
    )
    with Run("cl", "own", config, "x") as run:
        yield StreamSession(run, config, _vectors(222))


def test_growth_knows_nothing_of_boundaries_and_later_rows(session: StreamSession) -> None:
    plugin = session.growth
    assert plugin is not None
    plugin.__class__, plugin.probe_samples = _Asked, 20  # type: ignore[assignment]
    plugin.asked = []  # type: ignore[attr-defined]
    session.work()
    asked = plugin.asked  # type: ignore[attr-defined]
    assert len(asked) == 4 * 7 and not any(told for _, told, _ in asked)
    assert all(row < seen for seen, _, row in asked)
    assert asked[8][2] == 49 and asked[12][2] == 50 + 47  # the window before; what has come
    assert len(plugin.controller.events) == 3


@pytest.mark.parametrize("stop", [5, 12, 22])
def test_a_stream_resumes_in_a_window(
    stop: int, session: StreamSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynmoe.lab.run import Run

    saved: dict[str, Any] = {}
    step_done = session.recorder.step_done

    def note(step: int, *rest: Any) -> None:
        step_done(step, *rest)
        if step == stop:
            saved.update(copy.deepcopy(session.state()))

    monkeypatch.setattr(session.recorder, "step_done", note)
    session.work()
    config = replace(session.config, runs_dir=tmp_path / "other")
    with Run("cl", "own", config, "x") as run:
        again = StreamSession(run, config, session.data)
        again.restore(saved)
        again.work()
    assert again.summary() == session.summary()
    pairs = zip(again.model.parameters(), session.model.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_a_run_reports_windows_and_learns(tmp_path: Path) -> None:
    done = run_one(ContinualLearning(), "own", _config(runs_dir=tmp_path, lr=0.02), _vectors(800))
    tasks = done.summary["tasks"]
    assert len(tasks) == 4 and tasks[-1]["online_accuracy"] > 0.9 > tasks[0]["online_accuracy"]
    assert all(task["test_accuracy"] > 0.85 for task in tasks[1:])


def test_online_accuracy_is_that_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of 65 rows: each last batch is one row, and counts as one."""
    from dynmoe.lab.run import Run

    config, right = _config(runs_dir=tmp_path, chunks=2, batch_size=64), []
    with Run("cl", "own", config, "x") as run:
        session = StreamSession(run, config, _vectors(137))
        batch_done = session.recorder.batch_done

        def note(trainer: Any) -> None:
            right.append((trainer.mb_output.argmax(1) == trainer.mb_y).float())
            batch_done(trainer)

        monkeypatch.setattr(session.recorder, "batch_done", note)
        session.work()
        tasks = session.summary()["tasks"]
    assert [len(hits) for hits in right] == [64, 1, 64, 1]
    for task, (first, last) in zip(tasks, (right[:2], right[2:]), strict=True):
        assert task["online_accuracy"] == pytest.approx(float(torch.cat([first, last]).mean()))


def test_chunks_of_images_are_not_in_time_order(data: ImageData) -> None:
    train, _ = chunk_datasets(
        data, registry.get("protocol", "iid").Config().build().split(data, 4, 0)
    )
    assert isinstance(train[0], ChunkDataset) and not train[0].in_time_order

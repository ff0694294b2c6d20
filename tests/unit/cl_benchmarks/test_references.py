"""References on streams in time order, and further steps on rows that the learner keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks.datasets.vectors import standardised
from cl_benchmarks.experiment import ContinualLearning, StreamSession
from cl_benchmarks.images import ImageData
from cl_benchmarks.references import (
    nearest_neighbours,
    no_change,
    online_references,
    rows_known,
)
from cl_benchmarks.settings import Config
from dynmoe import registry
from dynmoe.cl import presets
from dynmoe.errors import UserError
from dynmoe.lab.experiment import Results
from dynmoe.lab.report import table
from dynmoe.lab.run import Run
from dynmoe.lab.runner import run_one


def _stream(rows: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=draw)
    return x, torch.randint(4, (rows,), generator=draw)


def _data(rows: int = 240) -> ImageData:
    """Labels in blocks of ten rows, each block of its own place."""
    block = torch.arange(rows) // 10
    y = (block * 3) % 4
    x = torch.stack([y.float(), block % 2, torch.zeros(rows)], dim=1)
    x = (x + 0.1 * torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)))[
        ..., None, None
    ]
    return ImageData(
        name="blocks", train_images=x, train_labels=y, test_images=x, test_labels=y, num_classes=4,
        in_time_order=True,
    )  # fmt: skip


def _config(tmp_path: Path, **options: Any) -> Config:
    base = replace(
        presets()["online"],
        network=registry.get("network", "mlp").Config(width=8, hidden=16),
        method=registry.get("method", "dense").Config(),
        protocol=registry.get("protocol", "online").Config(updates=3, rows=5, window=20),
        compare=(), chunks=3, batch_size=4, runs_dir=tmp_path,
    )  # fmt: skip
    return replace(base, **options)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_the_last_label_is_that_of_the_batch_before(batch: int) -> None:
    _, y = _stream()
    labels = y.tolist()
    expected = []
    for row in range(60):
        start = row - row % batch
        expected.append(start > 0 and labels[start - 1] == labels[row])
    assert no_change(y, rows_known([60], batch)).tolist() == expected


def test_batches_begin_anew_in_each_window() -> None:
    """As the network's do."""
    assert rows_known([5, 3], 2).tolist() == [0, 0, 2, 2, 4, 5, 5, 7]
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = online_references(y[:, None].float(), y, [5, 3], 2)
    assert found["repeat last label"] == pytest.approx([2 / 5, 1])


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("block", [9, 512])
def test_nearest_neighbours_are_the_naive_ones(
    batch: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_benchmarks.references.BLOCK", block)
    x, y = _stream()
    expected = []
    for row in range(60):
        start = row - row % batch
        past = range(max(0, start - 20), start)
        near = sorted(past, key=lambda other: float((x[row] - x[other]).norm()))[:5]
        votes = Counter(int(y[other]) for other in near)
        best = max(votes.values(), default=0)
        told = next((int(y[other]) for other in near if votes[int(y[other])] == best), -1)
        expected.append(told == int(y[row]))
    found = nearest_neighbours(x, y, rows_known([60], batch), k=5, window=20)
    assert found.tolist() == expected


def test_references_of_windows_stand_beside_the_runs(tmp_path: Path) -> None:
    data = _data()
    done = run_one(ContinualLearning(), "own", _config(tmp_path), data)
    rows = 240 - 12
    expected = online_references(
        data.train_images[:rows], data.train_labels[:rows], [76, 76, 76], 4
    )
    assert done.summary["references"] == expected
    assert min(map(min, expected.values())) > 0.4
    results = Results({"s": {"dense": [done.summary] * 2}}, {}, ContinualLearning())
    found = table(results, "s", difference=True)
    online = found[0].index("online")
    assert [row[0] for row in found[1:]] == ["dense", "repeat last label", "5-NN, last 1000 rows"]
    mean = sum(expected["repeat last label"]) / 3
    assert found[2][online] == f"{100 * mean:.1f}"
    assert set(found[2]) == {"repeat last label", f"{100 * mean:.1f}", ""}
    assert len({len(row) for row in found}) == 1


def test_further_steps_are_on_the_latest_rows_and_leave_the_prediction_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = _data(), _config(tmp_path)
    with Run("cl", "own", config, "x") as run:
        session = StreamSession(run, config, data)
        rehearsal = session.trainer.own_plugins[-1]
        plain, taken = rehearsal._step, []

        def note(strategy: Any, drawn: torch.Tensor) -> None:
            taken.append((strategy.clock.train_iterations, drawn.clone()))
            plain(strategy, drawn)

        monkeypatch.setattr(rehearsal, "_step", note)
        told = []
        done = session.recorder.batch_done

        def batch_done(trainer: Any) -> None:
            told.append((trainer.clock.train_iterations, len(trainer.mb_y), len(trainer.mb_output)))
            done(trainer)

        monkeypatch.setattr(session.recorder, "batch_done", batch_done)
        session.work()
    assert [step for step, _ in taken] == [step for step in range(57) for _ in range(2)]
    for step, drawn in taken:
        seen = 4 * (step + 1)
        assert len(drawn) == 5 and max(0, seen - 20) <= int(drawn.min())
        assert int(drawn.max()) < seen
    assert told == [(step, 4, 4) for step in range(1, 58)]  # the clock counts batches


def test_several_steps_per_batch_learn_blocks_of_labels_better(tmp_path: Path) -> None:
    online = registry.get("protocol", "online").Config
    found = [
        run_one(ContinualLearning(), "own", _config(tmp_path / str(n), protocol=online(updates=n)),
                _data()).summary["tasks"][-1]["online_accuracy"]
        for n in (1, 6)
    ]  # fmt: skip
    assert found[1] > found[0] + 0.1


def test_steps_resume_in_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws hang on the seed and the clock alone; interventions act in further steps, too."""
    import copy

    l2 = registry.get("intervention", "l2-init").Config()
    config, saved = _config(tmp_path / "a", intervention=l2), {}
    with Run("cl", "own", config, "x") as run:
        session = StreamSession(run, config, _data())
        step_done = session.recorder.step_done

        def note(step: int, *rest: Any) -> None:
            step_done(step, *rest)
            if step == 23:
                saved.update(copy.deepcopy(session.state()))

        monkeypatch.setattr(session.recorder, "step_done", note)
        session.work()
    assert session.trainer.own_plugins[-2].intervention.steps == 3 * 57
    config = replace(config, runs_dir=tmp_path / "b")
    with Run("cl", "own", config, "x") as run:
        again = StreamSession(run, config, _data())
        again.restore(saved)
        again.work()
    assert again.summary() == session.summary()


@pytest.mark.parametrize("option", ["updates", "rows", "window"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"protocol {option} 0 is too small; use 1 or more"):
        registry.get("protocol", "online").Config(**{option: 0}).build()


def test_rows_and_window_need_further_steps() -> None:
    online = registry.get("protocol", "online").Config
    one, two = (replace(presets()["online"], protocol=online(updates=n)) for n in (1, 2))
    assert {"protocol.rows", "protocol.window"} <= set(one.unused())
    assert "protocol.rows" not in two.unused()


def test_rows_are_scaled_by_all_rows_up_to_them() -> None:
    """A feature that runs away is cut off by the first rows' scale, and not by the past's."""
    draw = torch.Generator().manual_seed(0)
    values = torch.stack(
        [torch.arange(200.0), torch.randn(200, generator=draw), torch.ones(200)], dim=1
    ).double()
    found = standardised(values, 0.1, 10, "past")
    for row in (25, 120, 199):
        past = values[: row + 1, :2]
        expected = (values[row, :2] - past.mean(0)) / past.std(0, correction=0)
        assert found[row, :2].tolist() == pytest.approx(expected.tolist())
    assert found[:20].equal(standardised(values, 0.1, 10)[:20])
    assert found[:, 2].eq(0).all()
    assert standardised(values, 0.1, 10)[:, 0].eq(10).float().mean() > 0.5
    assert found[20:, 0].max() < 2.1

"""Protocol pairs: a long sequence of two-class tasks, and what hundreds of tasks cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expansion_helpers import config

from cl_benchmarks.experiment import ContinualLearning, StreamSession
from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk
from cl_benchmarks.protocols.pairs import matches
from cl_benchmarks.recorder import watched
from dynmoe import cl
from dynmoe.errors import UserError
from dynmoe.lab.experiment import logged
from dynmoe.lab.run import Run
from dynmoe.lab.runner import run_one
from dynmoe.registry import get


def pairs(data: ImageData, chunks: int, seed: int = 0) -> list[Chunk]:
    return get("protocol", "pairs").Config().build().stream(data, chunks, "limited", seed)


def classes(chunk: Chunk, data: ImageData) -> tuple[int, int]:
    """The class labelled 0 and that labelled 1."""
    found = []
    for label in (0, 1):
        (own,) = data.train_labels[chunk.train_index[chunk.train_labels == label]].unique()
        found.append(int(own))
    return found[0], found[1]


@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_all_pairs_come_once_and_classes_in_turn(count: int) -> None:
    whole = count * (count - 1) // 2
    found = matches(count, whole, np.random.default_rng(0))
    assert len({frozenset(pair) for pair in found}) == len(found) == whole
    for length in range(1, whole + 1):
        uses = Counter(label for pair in found[:length] for label in pair)
        every = [uses[label] for label in range(count)]
        assert max(every) - min(every) <= 1 + count % 2
    assert matches(count, 1, np.random.default_rng(0)) == found[:1]


def test_a_chunk_has_all_images_of_two_classes(data: ImageData) -> None:
    chunks = pairs(data, 66)
    for chunk in chunks:
        pair = classes(chunk, data)
        for index, labels, own in (
            (chunk.train_index, chunk.train_labels, data.train_labels),
            (chunk.test_index, chunk.test_labels, data.test_labels),
        ):
            assert torch.equal(index, torch.isin(own, torch.tensor(pair)).nonzero()[:, 0])
            assert torch.equal(own[index], torch.tensor(pair)[labels])
    assert len({frozenset(classes(chunk, data)) for chunk in chunks}) == 66
    orders = [[classes(c, data) for c in pairs(data, 6, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    lower_first = [a < b for a, b in (classes(chunk, data) for chunk in chunks)]
    assert 20 < sum(lower_first) < 46  # either class may be the first


def test_what_it_refuses(data: ImageData) -> None:
    for chunks in (0, 67):
        with pytest.raises(UserError, match=r"make 66 pairs; use --chunks 1 to 66"):
            pairs(data, chunks)
    protocol = get("protocol", "pairs").Config().build()
    with pytest.raises(UserError, match="use --access limited"):
        protocol.stream(data, 3, "cumulative", 0)
    assert protocol.num_outputs(data, 3) == 2 and protocol.resets_head
    assert not protocol.keeps_labels()


# ---------------------------------------------------------------- what is measured of many tasks


def test_ten_tasks_are_watched_at_most() -> None:
    for tasks in range(1, 11):
        assert watched(tasks, 1) == list(range(tasks))
    many = watched(300, 1)
    assert len(many) == 10 and many[0] == 0 and many[-1] == 299
    assert max(np.diff(many)) - min(np.diff(many)) <= 1
    assert watched(300, 50) == [0, 50, 100, 150, 200, 250]
    assert all(task % 7 == 0 for task in watched(300, 7)) and len(watched(300, 7)) == 10


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def short(runs: Path, method: str = "moe-static", **changes: Any) -> Any:
    options = {"experts": 3} if method == "moe-static" else {}
    return config(
        runs,
        method=(method, options),
        protocol="pairs",
        epochs=1,
        name="x",
        **{"chunks": 13, **changes},
    )


def test_probes_and_gates_are_bounded(digits: ImageData, tmp_path: Path) -> None:
    settings = short(tmp_path)
    with Run("cl", "own", settings, "x") as run:
        session = StreamSession(run, settings, digits)
        held: list[int] = []
        task_done = session.recorder.task_done

        def count(trainer: Any) -> None:
            task_done(trainer)
            held.append(len(session.recorder.probes))

        session.recorder.task_done = count  # type: ignore[method-assign]
        session.work()
    assert len(held) == 13 and max(held) <= 11
    assert sorted(session.recorder.gates) == watched(13, 1)


def test_metrics_of_every_nth_task(digits: ImageData, tmp_path: Path) -> None:
    done = run_one(ContinualLearning(), "x", short(tmp_path, measure_every=5), digits)
    assert len(done.summary["tasks"]) == 13
    lines = [json.loads(line) for line in (done.folder / "log.jsonl").read_text().splitlines()]
    ends = [row["steps"] for row in done.summary["tasks"]]
    for tag in ("dormant/0", "epoch/test_accuracy", "task/entk_effective_rank"):
        steps = [line["step"] for line in lines if tag in line]
        assert steps == [ends[0], ends[5], ends[10]], tag
    assert len(logged(done.folder, "task/test_accuracy")) == 13
    assert len(logged(done.folder, "router/drift/blocks.0")) == 2


def test_what_is_measured_changes_nothing(digits: ImageData, tmp_path: Path) -> None:
    found = [
        run_one(
            ContinualLearning(), "x", short(tmp_path / str(n), measure_every=n, chunks=4), digits
        ).summary
        for n in (1, 3)
    ]
    assert found[0]["tasks"] == found[1]["tasks"]
    with pytest.raises(UserError, match="--measure-every 0 is too small"):
        ContinualLearning().check(replace(cl.presets()["laptop"], measure_every=0))


def test_two_digits_are_told_apart_from_a_head_of_zeros(digits: ImageData, tmp_path: Path) -> None:
    settings = replace(short(tmp_path, "dense"), chunks=4, epochs=6, lr=0.01)
    summary = run_one(ContinualLearning(), "x", settings, digits).summary
    assert all(row["test_accuracy"] > 0.8 for row in summary["tasks"])


def test_the_head_is_zero_at_task_starts_after_an_injection_too(
    digits: ImageData, tmp_path: Path
) -> None:
    settings = short(tmp_path, "dense", chunks=4, intervention=("injection", {"task": 1}))
    found: list[float] = []

    class Looking:
        """Behind the other plugins: the largest output as a task starts."""

        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            x = torch.randn(3, *digits.shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                found.append(float(strategy.model.eval()(x).abs().max()))

    with Run("cl", "own", settings, "x") as run:
        session = StreamSession(run, settings, digits)
        session.trainer.plugins.append(Looking())
        session.work()
    assert found == [0.0] * 4

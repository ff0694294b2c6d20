"""The study of upcycling: what its flags do to a network, and what its verdict compares."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from cl_benchmarks.experiment import ContinualLearning
from dynmoe import cl
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import Results
from dynmoe.lab.runner import run_one
from dynmoe.lab.study import judge
from dynmoe.studies import upcycling
from dynmoe.studies.upcycling import UpcycleStudy


@pytest.mark.parametrize(
    ("variant", "experts", "units"),
    [("upcycled by splitting", [1, 4], 32), ("upcycled by copying", [1, 2], 64)],
)
def test_a_dense_network_becomes_a_mixture_that_computes_the_same(
    variant: str, experts: list[int], units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(upcycling.FIRST_TASK, "class", 4)
    study = UpcycleStudy()
    own = study.flags_on("class", study.variants("laptop")[variant])
    short = (
        "--protocol shuffle --protocol.images 64 --dataset digits --chunks 2 --epochs 4 "
        f"--network mlp --network.hidden 32 --network.no-neck --compare --runs-dir {tmp_path}"
    )
    _, config = parse(cl.presets(), [*shlex.split(own), *shlex.split(short)], "study", "")
    experiment = ContinualLearning()
    done = run_one(experiment, "laptop", config, experiment.load(config))
    summary = done.summary
    assert [task["num_experts"] for task in summary["tasks"]] == experts
    for event in summary["growth"]:
        assert 4 <= event["step"] <= 6 and event["shock"]["output_change"] < 1e-5
    assert summary["growth"][-1]["hidden_sizes"] == {"blocks.0": [units // experts[1]] * experts[1]}


def test_the_verdict() -> None:
    study = UpcycleStudy()

    def runs(value: float) -> list[dict[str, Any]]:
        row = {"train_accuracy": value, "test_accuracy": value}
        return [{"tasks": [row, row]}] * 3

    values = {"upcycled by splitting": 0.6, "upcycled by copying": 0.4}
    streams = {s: {v: runs(values.get(v, 0.5)) for v in study.variants("laptop")}
               for s in study.streams("laptop")}  # fmt: skip
    sentences, _ = judge(study, Results(streams, {}, ContinualLearning()))
    assert len(sentences) == 5 * 3 + 5 * 2
    assert sentences[0].startswith("class: upcycled by splitting against dense: +10.0 points")
    assert not any("shuffle" in s and "test accuracy" in s for s in sentences)
    assert list(study.streams("paper")) == ["iid"]

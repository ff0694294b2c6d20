"""What `dynmoe.report` shows of the runs of each command, and a report of really trained ones."""

from __future__ import annotations

import fnmatch
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.experiment import ReinforcementLearning
from cl_benchmarks.experiment import MATRIX, ContinualLearning
from dynmoe import cl, report
from dynmoe.experiments.dg.experiment import DomainGeneralisation
from dynmoe.experiments.tta.experiment import TestTimeAdaptation
from dynmoe.lab.experiment import Curve, Experiment
from dynmoe.registry import get

ROOT = Path(__file__).parents[2]
GROWTH = {"step": 5, "experts": 4, "parameters": 70}


def test_a_report_of_trained_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(
        cl.presets()["smoke"], runs_dir=tmp_path, chunks=2, epochs=1, eval_samples=20,
        probe_samples=20, seeds=2, compare=("dense",),
        protocol=get("protocol", "shuffle").Config(images=150),
        network=get("network", "mlp").Config(width=16, hidden=24),
    )  # fmt: skip
    for preset in ("own", "smoke"):
        cl.run(replace(small, runs_dir=tmp_path / preset), preset)
        told = "numbers that say something: --preset minute" in capsys.readouterr().out
        assert told == (preset == "smoke")
    out = tmp_path / "out"
    report.main(
        [str(tmp_path / "own" / "cl"), "--out", str(out), "--first", "dense", "--title", "T<1>"]
    )
    printed = capsys.readouterr()
    assert printed.err == "" and str(out / "report.html") in printed.out
    page = (out / "report.html").read_text()
    assert "T&lt;1&gt;" in page and "4 finished runs" in page and "Router maps" in page
    lines = (out / "comparison.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in lines] == ["variant", "dense", "dynamicmoe"]
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "tables.tex", "runs.csv", "cl-1-1-means.pdf"} <= names
    assert "cl-1-1-curves.svg" in names


def test_details_of_continual_learning() -> None:
    tasks = [{"train_accuracy": 0.5, "test_accuracy": 0.25, "online_accuracy": 0.4,
              "old_accuracy": None, "parameters": 30},
             {"train_accuracy": 0.75, "test_accuracy": 0.5, "online_accuracy": 0.6,
              "old_accuracy": 0.2, "parameters": 70}]  # fmt: skip
    matrix = {"before": [0.1, 0.2], "after": [[0.9, None], [0.8, 0.7]]}
    summary = {"tasks": tasks, "growth": [GROWTH], "accuracy_matrix": matrix}
    found = ContinualLearning().details(summary)
    assert found.curves["train_accuracy"] == Curve("task", [(1, 0.5), (2, 0.75)])
    assert found.curves["old_accuracy"].points == [(2, 0.2)]
    before, first, last = found.matrices[MATRIX]
    assert before == [0.1, 0.2] and first[0] == 0.9 and math.isnan(first[1]) and last == [0.8, 0.7]
    assert found.growths == [GROWTH] and found.cost == {"parameters": 70}
    assert ContinualLearning().details({**summary, "accuracy_matrix": None}).matrices == {}


def test_the_worst_task_is_the_one_with_most_of_what_should_be_little() -> None:
    rows = [{"train_accuracy": x, "forgetting": x, "ece": x} for x in (0.2, 0.6, 0.4)]
    experiment, summary = ContinualLearning(), {"tasks": rows}
    assert experiment.value(summary, "train_accuracy", "worst") == 0.2
    assert experiment.value(summary, "forgetting", "worst") == 0.6
    assert experiment.value(summary, "ece", "worst") == 0.6
    assert experiment.value(summary, "forgetting", "mean") == pytest.approx(0.4)


def test_details_of_the_other_commands() -> None:
    rl = {"curve": [[10, None], [20, 1.5]], "growth": [], "parameters": 5, "env_steps": 20}
    found = ReinforcementLearning().details(rl)
    assert found.curves["episodic_return"] == Curve("environment steps", [(20, 1.5)])
    assert found.cost == {"parameters": 5, "env_steps": 20}
    found = TestTimeAdaptation().details({"curve": [0.5, 0.75], "trained": 3, "images": 64})
    assert found.curves["accuracy"].points == [(1, 0.5), (2, 0.75)]

    def test(domain: str, *accuracies: float) -> dict[str, Any]:
        curve = [{"step": 40 * (i + 1), "out": {domain: a, "x": 0.0}}
                 for i, a in enumerate(accuracies)]  # fmt: skip
        return {"domain": domain, "curve": curve, "growth": [GROWTH], "parameters": 9,
                "trainable": 2}  # fmt: skip

    found = DomainGeneralisation().details({"tests": [test("a", 0.1, 0.2), test("b", 0.3, 0.6)]})
    [curve] = found.curves.values()
    assert curve.points == [(40, pytest.approx(0.2)), (80, pytest.approx(0.4))]
    assert found.growths == [GROWTH, GROWTH] and found.cost == {"parameters": 9, "trainable": 2}


@pytest.mark.parametrize(
    "experiment",
    [ContinualLearning(), ReinforcementLearning(), TestTimeAdaptation(), DomainGeneralisation()],
    ids=lambda one: one.command,
)
def test_streams_are_told_by_settings_that_exist(experiment: Experiment) -> None:
    settings = next(iter(report.load(experiment.command).presets().values()))
    assert experiment.about and all(hasattr(settings, name) for name in experiment.about)


def test_the_template_is_installed() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["dynmoe"]
    others = [p.relative_to(ROOT / "dynmoe") for p in (ROOT / "dynmoe").rglob("*.html")]
    assert others and all(any(fnmatch.fnmatch(str(o), p) for p in patterns) for o in others)

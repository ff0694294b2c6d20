"""Figures drawn again from results.json: the numbers are those of the runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynmoe import registry
from dynmoe.commands import load
from dynmoe.errors import UserError
from dynmoe.lab.experiment import Results
from dynmoe.study import draw_again

STUDIES = Path(__file__).parents[2] / "docs" / "results" / "studies"
MEANS = {"cl": "train_accuracy_mean", "tta": "accuracy_mean", "dg": "accuracy"}
"""Command -> a mean over seeds, with its interval, that its results.json holds."""


def numbers(name: str) -> dict[str, Any]:
    return json.loads((STUDIES / name / "results.json").read_text())


@pytest.mark.parametrize("name", ["granularity", "growth-or-reset", "tta-methods", "dg-methods"])
def test_means_are_those_that_the_runs_gave(name: str) -> None:
    command = registry.get("study", name).command
    experiment, seen = load(command).experiment(), 0
    for stream, variants in numbers(name)["streams"].items():
        runs = {variant: experiment.summaries(entry) for variant, entry in variants.items()}
        results = Results({stream: runs}, {stream: {}}, experiment)
        for variant, entry in variants.items():
            metric = MEANS[command].removesuffix("_mean")
            point = results.interval(stream, variant, metric, "mean").point
            assert point == pytest.approx(entry[MEANS[command]][0], abs=1.01e-4), variant
            assert len(runs[variant]) == numbers(name)["seeds"]
            seen += 1
    assert seen > 5


def test_the_figure_stands_beside_the_numbers(tmp_path: Path) -> None:
    file = shutil.copy(STUDIES / "dg-router" / "results.json", tmp_path)
    told = numbers("dg-router") | {"chance": {"embedded": 0.7}}
    assert draw_again(Path(file)) == tmp_path / "figure.png"
    before = (tmp_path / "figure.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    Path(file).write_text(json.dumps(told))
    assert draw_again(Path(file)).read_bytes() != before  # a line more
    tasks = {"a": {m: [[0.1, 0.2]] for m in ("train_accuracy", "online_accuracy", "test_accuracy")}}
    (tmp_path / "mine.json").write_text(json.dumps({"title": "t", "seeds": 1, "variants": tasks}))
    assert draw_again(tmp_path / "mine.json") == tmp_path / "mine.png"


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(UserError, match="cannot read .*No such file"):
        draw_again(file)
    for text, reason in (
        ("no", "it is no JSON"),
        ("[]", "no results.json of a comparison"),
        ('{"seeds": 1}', "does not hold what the figure shows"),
        ('{"seeds": 1, "streams": {"s": {"v": {"curve": []}}}}', "does not hold what"),
        (json.dumps(numbers("rl-growth")), "figures of rl are not drawn from results.json alone"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=reason):
            draw_again(file)
    assert not (tmp_path / "figure.png").exists()

"""Studies of adaptation and domain generalisation: numbers of runs, and real small ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dynmoe import commands, registry
from dynmoe.experiments.tta.figures import gain_so_far
from dynmoe.lab.experiment import At, Experiment, Results
from dynmoe.lab.figures import dots
from dynmoe.lab.statistics import Interval
from dynmoe.lab.study import Command, Preset, Study
from dynmoe.study import Config, carry_out

EXPERIMENTS: dict[str, Experiment] = {
    name: commands.load(name).experiment() for name in ("cl", "tta", "dg")
}
TTA: dict[str, Any] = {
    "accuracy": 0.5,
    "curve": [0.1, *[0.5] * 18, 0.8],
    "domains": {"fog": {"accuracy": 0.4}, "clean": {"accuracy": 0.9}},
    "history": [
        {"batch": b, "largest_share": b / 20, "similarity": [None, b / 10, b / 5]}
        for b in range(1, 21)
    ],
    "routings": {"learned": {"accuracy": 0.7}, "random": {"accuracy": 0.6}},
}
PLAIN: dict[str, Any] = {"accuracy": 0.4, "curve": [0.4], "domains": {"fog": {}}, "history": [],
                         "routings": {}}  # fmt: skip
DG = {"tests": [{"accuracy": a, "trainable": 10, "measures": {"kl": a / 2, "spread": 1.0,
                                                               "loss_change": -0.5}}
                for a in (0.6, 0.8)]}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "at", "expected"),
    [
        ("accuracy", "mean", 0.5),
        ("accuracy", "first", 0.3),  # the first tenth: two windows
        ("accuracy", "last", 0.65),
        ("clean", "mean", 0.9),
        ("routing_gain", "mean", 0.1),
        ("largest_share", "last", 19.5 / 20),
        ("similarity", "first", 0.225),  # mean of the layers that have a number
    ],
)
def test_numbers_of_a_run_of_adaptation(metric: str, at: At, expected: float) -> None:
    view = EXPERIMENTS["tta"]
    assert view.value(TTA, metric, at) == pytest.approx(expected)
    if metric != "accuracy":
        assert math.isnan(view.value(PLAIN, metric, at))


def test_sentences_about_a_stream() -> None:
    later = TTA | {"accuracy": 0.6}
    r = Results({"s": {"a": [later, later], "b": [TTA, TTA]}}, {"s": {}}, EXPERIMENTS["tta"])
    assert r.says("s", "a", "b").startswith(
        "s: a against b: +10.0 points [10.0, 10.0], higher (acc"
    )
    assert "(accuracy, whole stream;" in r.says("s", "a", "b")
    gained = "s: a from first to last tenth of the stream: +90.0 points [90.0, 90.0], rises"
    assert r.kept("s", "a", "largest_share").startswith(gained)
    assert "+2.70 [2.70, 2.70]" in r.kept("s", "b", "similarity")


def test_a_metric_that_runs_lack_has_no_interval() -> None:
    r = Results({"s": {"a": [PLAIN, PLAIN]}}, {"s": {}}, EXPERIMENTS["tta"])
    assert all(map(math.isnan, r.interval("s", "a", "clean")))


def test_gains_along_a_stream_are_against_another_run_on_the_same_images() -> None:
    found = gain_so_far({"curve": [0.5, 0.6, 0.9]}, {"curve": [0.4, 0.7, 0.6]})
    assert found == pytest.approx([0.1, 0.0, 0.1])


def test_numbers_of_a_trial_are_means_over_left_out_domains() -> None:
    assert EXPERIMENTS["dg"].value(DG, "accuracy", "mean") == pytest.approx(0.7)
    assert EXPERIMENTS["dg"].value(DG, "kl", "mean") == pytest.approx(0.35)
    assert EXPERIMENTS["dg"].unit("trainable") == (1.0, "", 0)
    r = Results({"s": {"a": [DG, DG], "b": [DG, DG]}}, {"s": {}}, EXPERIMENTS["dg"])
    assert "accuracy, mean over left-out domains" in r.says("s", "a", "b")


def test_the_departure_of_mixed_parameters_is_told_in_nats() -> None:
    study = registry.get("study", "dg-experts")()
    runs = {variant: [DG, DG] for variant in study.variants("laptop")}
    *_, sentence = study.verdict(Results({"s": runs}, {"s": {}}, EXPERIMENTS["dg"]))
    assert sentence.startswith(
        "s: 5 outer experts, deltas: predictions of mixed parameters are 0.3500 nats"
    )
    assert "changes by -0.5000 nats [-0.5000, -0.5000]." in sentence


def test_a_row_of_dots_per_variant() -> None:
    axes = Figure().subplots()
    dots(axes, {"b": Interval(0.2, math.nan, math.nan), "a": Interval(0.5, 0.4, 0.7)}, 100)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    xs = [[float(x) for x in line.get_xdata()] for line in axes.lines]
    assert xs == [[40, 70], [50], [20]]  # no bar where the ends are not known
    assert [float(line.get_ydata()[0]) for line in axes.lines] == [2, 2, 1]


@pytest.mark.parametrize(("variants", "height"), [(12, 360), (23, 560)])
def test_many_variants_are_drawn_as_rows(tmp_path: Path, variants: int, height: int) -> None:
    """Curves need the same room however many they are; rows need more."""
    names = ["dense", "fresh", *(f"v{n}" for n in range(variants - 2))]
    row = {"train_accuracy": 0.5, "online_accuracy": 0.4, "test_accuracy": 0.3}
    runs = {name: [{"tasks": [row, row]}] * 2 for name in names}
    results = Results({"s": runs}, {}, EXPERIMENTS["cl"])
    results.experiment.draw(tmp_path / "figure.png", results, "title")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1300, height)


class SmallShifts(Study):
    """Does adapting help?"""

    name = "small-shifts-test"  # not registered: other tests read the registry
    command: ClassVar[Command] = "tta"

    def streams(self, preset: Preset) -> dict[str, str]:
        return {"clean too": "--preset smoke --streams potpourri+"}

    def variants(self, preset: Preset) -> dict[str, str]:
        return {"tent": "--method tent", "moetta": "--method moetta --method.num-experts 3"}

    def verdict(self, results: Results) -> list[str]:
        return [results.says("clean too", "moetta", "tent", metric="clean")]


class SmallDomains(Study):
    """Does more than the head have to learn?"""

    name = "small-domains-test"
    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        return {"embedded": "--preset smoke"}

    def variants(self, preset: Preset) -> dict[str, str]:
        return {"probe": "--method linear-probe", "lora": "--method lora"}

    def verdict(self, results: Results) -> list[str]:
        return [results.says("embedded", "lora", "probe")]


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(SmallShifts(), id="tta", marks=pytest.mark.slow),
        pytest.param(SmallDomains(), id="dg"),
    ],
)
def test_a_study_runs_and_reports(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(study=study.name, seeds=2, runs_dir=tmp_path, jobs=1)
    carry_out(study, config, ["--threads", "1"])
    out = tmp_path / "study" / f"{study.name}-laptop"
    found = json.loads((out / "results.json").read_text())
    (stream,) = found["streams"].values()
    assert list(stream) == list(study.variants("laptop"))
    for entry in stream.values():
        folder = tmp_path / study.command / "studies" / entry["runs"]
        runs = [json.loads((folder / f"seed-{s}" / "summary.json").read_text()) for s in (0, 1)]
        if study.command == "tta":
            mean = sum(run["accuracy"] for run in runs) / 2
            assert entry["accuracy_mean"][0] == pytest.approx(mean, abs=1e-4)
        else:
            rows = [row["accuracy"] for run in runs for row in run["tests"]]
            assert entry["accuracy"][0] == pytest.approx(sum(rows) / len(rows), abs=1e-4)
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert found["verdict"][0] in capsys.readouterr().out
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("summary.json")}
    carry_out(study, config, ["--threads", "1"])
    assert len(before) == 4
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("summary.json")}

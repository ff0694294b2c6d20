"""What trials add up to: DomainBed's means and errors, intervals, and the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from dynmoe.experiments.dg.report import collect, mean_error, print_table, report

from dynmoe.experiments.dg.settings import Config


def summary(accuracies: dict[str, float], trainable: int) -> dict[str, Any]:
    tests = [
        {"domain": d, "accuracy": a, "parameters": 1000, "trainable": trainable,
         "measures": {"kl": a} if trainable == 70 else {}}
        for d, a in accuracies.items()
    ]  # fmt: skip
    return {"dataset": "set", "model": "vit", "domains": list(accuracies), "tests": tests}


RUNS = {
    "moe2": [summary({"a": a, "b": b}, 70) for a, b in ((0.5, 0.9), (0.6, 0.7), (0.7, 0.8))],
    "erm": [summary({"a": a, "b": b}, 900) for a, b in ((0.4, 0.8), (0.5, 0.6), (0.6, 0.7))],
}


def test_means_and_errors() -> None:
    mean, error = mean_error([0.5, 0.6, 0.7])
    spread = math.sqrt((0.01 + 0 + 0.01) / 3)
    assert mean == pytest.approx(0.6) and error == pytest.approx(spread / math.sqrt(3))
    assert math.isnan(mean_error([0.5])[1])


def test_averages_are_over_domains_within_each_trial() -> None:
    found = collect(RUNS)["moe2"]
    averages = [(0.5 + 0.9) / 2, (0.6 + 0.7) / 2, (0.7 + 0.8) / 2]
    assert found["average"] == pytest.approx(mean_error(averages))
    assert found["domains"]["b"] == pytest.approx(mean_error([0.9, 0.7, 0.8]))
    assert found["interval"].point == pytest.approx(0.7)
    assert found["interval"].low < 0.7 < found["interval"].high


def test_differences_are_paired() -> None:
    found = collect(RUNS)
    assert found["moe2"]["difference"] is None
    gap = found["erm"]["difference"]  # 0.1 everywhere, so pairing leaves no doubt
    assert tuple(gap) == pytest.approx((-0.1, -0.1, -0.1))


def test_what_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: [tmp_path] * 3 for name in RUNS}
    report(tmp_path / "report", Config(), RUNS, folders)
    out = capsys.readouterr().out
    for text in ("70.0", "-10.0 [-10.0, -10.0]", "900", "3 trial(s)", "95 % t", "moe2: kl 0.7000"):
        assert text in out
    assert "erm: " not in out
    kept = json.loads((tmp_path / "report" / "results.json").read_text())
    assert kept["methods"]["erm"]["values"]["a"] == [0.4, 0.5, 0.6]
    assert kept["methods"]["moe2"]["measures"] == {"kl": pytest.approx(0.7)}
    assert (tmp_path / "report" / "accuracy_parameters.png").read_bytes()[:4] == b"\x89PNG"


def test_one_trial_has_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(collect({name: own[:1] for name, own in RUNS.items()}), "title", 1)
    out = capsys.readouterr().out
    assert "±" not in out.split("mean")[0] and "[" not in out and "nan" not in out

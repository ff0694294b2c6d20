"""What trials add up to: DomainBed's means and errors, intervals, and the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynmoe.experiments.dg.experiment import DomainGeneralisation, domain_table, mean_error
from dynmoe.experiments.dg.settings import Config
from dynmoe.lab.experiment import Results
from dynmoe.lab.report import report


def summary(accuracies: dict[str, float], trainable: int) -> dict[str, Any]:
    tests = [
        {"domain": d, "accuracy": a, "oracle_accuracy": a, "growth": [],
         "parameters": 1000, "trainable": trainable,
         "measures": {"kl": a} if trainable == 70 else {}}
        for d, a in accuracies.items()
    ]  # fmt: skip
    return {"dataset": "set", "model": "vit", "domains": list(accuracies), "tests": tests}


RUNS = {
    "moe2": [summary({"a": a, "b": b}, 70) for a, b in ((0.5, 0.9), (0.6, 0.7), (0.7, 0.8))],
    "erm": [summary({"a": a, "b": b}, 900) for a, b in ((0.4, 0.8), (0.5, 0.6), (0.6, 0.7))],
}


SOURCE: Any = SimpleNamespace(data=SimpleNamespace(name="set", classes=["a", "b"]), about="")


def results(folder: Path = Path()) -> Results:
    folders = {name: [folder] * len(own) for name, own in RUNS.items()}
    return Results({"": RUNS}, {"": folders}, DomainGeneralisation())


def test_means_and_errors() -> None:
    mean, error = mean_error([0.5, 0.6, 0.7])
    spread = math.sqrt((0.01 + 0 + 0.01) / 3)
    assert mean == pytest.approx(0.6) and error == pytest.approx(spread / math.sqrt(3))
    assert math.isnan(mean_error([0.5])[1])


def test_averages_are_over_domains_within_each_trial() -> None:
    found = results().interval("", "moe2")
    assert found.point == pytest.approx(0.7)
    assert found.low < 0.7 < found.high
    averages = [(0.5 + 0.9) / 2, (0.6 + 0.7) / 2, (0.7 + 0.8) / 2]
    mean, error = mean_error(averages)
    (row,) = [row for row in domain_table(RUNS) if row[0] == "moe2"]
    assert row[3:] == [f"{100 * mean:.1f}±{100 * error:.1f}"]
    low, high = mean_error([0.9, 0.7, 0.8])
    assert row[2] == f"{100 * low:.1f}±{100 * high:.1f}"


def test_differences_are_paired() -> None:
    gap = results().difference("", "erm", "moe2")  # 0.1 everywhere, so pairing leaves no doubt
    assert tuple(gap) == pytest.approx((-0.1, -0.1, -0.1))


def test_what_is_written_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # so that tables have one line a row
    report(tmp_path / "report", Config(), SOURCE, results(tmp_path))
    out = capsys.readouterr().out
    for text in ("70.0", "-10.0 [-10.0, -10.0]", "900", "3 trial(s)", "95 % t"):
        assert text in out
    assert "moe2, as docs/dg.md explains: kl 0.7000" in out
    assert "moe2: 70 of 1,000 parameters are trained" in out
    assert out.count("erm: ") == 1  # it has no figures of its own
    kept = json.loads((tmp_path / "report" / "results.json").read_text())["streams"][""]
    assert kept["erm"]["domains"]["a"] == [0.4, 0.5, 0.6]
    assert kept["moe2"]["measures"] == {"kl": pytest.approx(0.7)}
    assert (tmp_path / "report" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_one_trial_has_no_errors() -> None:
    rows = domain_table({name: own[:1] for name, own in RUNS.items()})
    assert not any("±" in cell or "nan" in cell for row in rows for cell in row)

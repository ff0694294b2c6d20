"""What is made of finished runs: tables, figures, and the results of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynmoe import sweep
from dynmoe.errors import UserError
from dynmoe.lab import figures
from dynmoe.lab.config import run_command
from dynmoe.lab.figures import band_figure, plasticity_figure
from dynmoe.lab.tables import print_methods, print_tasks
from dynmoe.plasticity.tasks import plasticity_summary

COLORS = ("#1b6ca8", "#d1495b", "#e29a2d")
"""Easily told from the gray of text and axes."""


@pytest.fixture(autouse=True)
def few_bright_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(figures.COLORS)) == len(figures.COLORS) >= 5
    monkeypatch.setattr(figures, "COLORS", COLORS)


def _tasks(*train: float) -> list[dict[str, Any]]:
    return [
        {"train_accuracy": x, "test_accuracy": x / 2, "online_accuracy": x / 4,
         "num_experts": 2 * (i + 1), "parameters": 12345, "steps": 10 * (i + 1)}
        for i, x in enumerate(train)
    ]  # fmt: skip


def _summary(*train: float) -> dict[str, Any]:
    keys = ("train_accuracy", "test_accuracy", "online_accuracy")
    tasks = _tasks(*train)
    return {
        "tasks": tasks,
        "plasticity": {key: plasticity_summary([task[key] for task in tasks]) for key in keys},
    }


def _colors(path: Path) -> set[tuple[int, ...]]:
    """Colours in a PNG file; reading it checks all of it."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size >= (800, 250)
        return {tuple(pixel) for pixel in np.unique(
            np.array(image.convert("RGB")).reshape(-1, 3), axis=0
        ).tolist()}  # fmt: skip


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_figures_show_a_line_per_method(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plasticity_figure(one, {"dense": _tasks(0.9, 0.5)}, "digits")
    assert _rgb(COLORS[0]) in _colors(one) and _rgb(COLORS[1]) not in _colors(one)
    plasticity_figure(two, {"dense": _tasks(0.9, 0.5), "fresh": _tasks(0.2, 0.4)}, "digits")
    assert {_rgb(COLORS[0]), _rgb(COLORS[1])} <= _colors(two)
    plasticity_figure(one, {"one task": _tasks(0.9)}, "digits")
    assert _rgb(COLORS[0]) in _colors(one)
    many = {f"method {i}": _tasks(0.1 * i, 0.05 * i) for i in range(len(COLORS) + 2)}
    plasticity_figure(one, many, "more methods than colours")
    assert {_rgb(color) for color in COLORS} <= _colors(one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_band_figure(tmp_path: Path) -> None:
    keys = ("train_accuracy", "test_accuracy", "online_accuracy")
    wide = {key: [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]] for key in keys}
    none = {key: [[0.5, 0.5]] * 3 for key in keys}
    band_figure(tmp_path / "wide.png", {"seeds": 3, "variants": {"a": wide}}, "title")
    band_figure(tmp_path / "none.png", {"seeds": 3, "variants": {"a": none}}, "title")
    light = {tuple(round(0.85 * 255 + 0.15 * x) for x in _rgb(COLORS[0]))}

    def shows_band(path: Path) -> bool:
        return any(
            all(abs(x - y) <= 2 for x, y in zip(color, shade, strict=True))
            for color in _colors(path)
            for shade in light
        )

    assert shows_band(tmp_path / "wide.png") and not shows_band(tmp_path / "none.png")


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(_summary(0.9, 0.505), "dense: digits")
    out = capsys.readouterr().out
    assert "dense: digits" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()
            if line.startswith("│")]  # fmt: skip
    assert rows == [
        ["1", "90.0 %", "45.0 %", "22.5 %", "2", "12,345"],
        ["2", "50.5 %", "25.2 %", "12.6 %", "4", "12,345"],
    ]
    print_methods({"dense": _summary(0.9, 0.5, 0.7), "fresh": _summary(0.6, 0.6, 0.6)}, "digits")
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()
            if line.startswith("│")]  # fmt: skip
    assert rows[0][:5] == ["dense", "90.0 %", "70.0 %", "70.0 %", "50.0 %"]
    assert rows[0][5:] == ["-10.0 points", "35.0 %"]
    assert rows[1] == ["fresh", "60.0 %", "60.0 %", "60.0 %", "60.0 %", "+0.0 points", "30.0 %"]


FLAGS = "--preset smoke --chunks 2 --epochs 2 --eval-samples 60 --probe-samples 40"


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cl", "--name", "s", "--seeds", "2", "--jobs", "2", "--runs-dir", str(tmp_path),
            "--variants", "plain: --method dense", "g1: --granularity 1", "--",
            *FLAGS.split()]  # fmt: skip
    sweep.main(argv)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "sweep" / "s" / "results.json").read_text())
    assert results["flags"] == FLAGS and results["seeds"] == 2
    assert list(results["variants"]) == ["plain", "g1"]
    assert sorted(p.name for p in (tmp_path / "cl" / "s").iterdir()) == ["g1", "plain"]

    summaries = {p: json.loads(p.read_text()) for p in tmp_path.rglob("summary.json")}
    assert len(summaries) == 4
    for label, entry in results["variants"].items():
        folder = tmp_path / "cl" / "s" / label
        for metric in ("train_accuracy", "test_accuracy", "online_accuracy"):
            runs = [
                [task[metric] for task in summaries[folder / seed / "summary.json"]["tasks"]]
                for seed in ("seed-0", "seed-1")
            ]
            assert entry[metric] == runs and runs[0] != runs[1]
            shown = entry[f"{metric}_summary"]
            for name, values in (
                ("first task", [run[0] for run in runs]),
                ("last task", [run[-1] for run in runs]),
                ("mean over tasks", [sum(run) / len(run) for run in runs]),
            ):
                point, low, high = shown[name]
                assert point == pytest.approx(sum(values) / 2)
                reach = 12.7062 * abs(values[1] - values[0]) / 2  # t of one degree of freedom
                assert [low, high] == pytest.approx([point - reach, point + reach], rel=1e-4)
    assert (
        f"{100 * results['variants']['plain']['train_accuracy_summary']['last task'][0]:.1f}"
        in (out)
    )
    assert _colors(tmp_path / "sweep" / "s" / "plasticity.png")

    times = {p: p.stat().st_mtime_ns for p in summaries}
    logs = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("log.jsonl")}
    sweep.main([*argv[:4], "1", *argv[5:]])  # of one seed now
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}
    assert logs == {p: p.stat().st_mtime_ns for p in logs}
    kept = (tmp_path / "sweep" / "s" / "results.json").read_bytes()
    for other in (["--protocol", "permuted"], ["--epochs", "1"]):
        with pytest.raises(UserError, match=r"holds a run with other settings \(.*->.*--name"):
            sweep.main([*argv, *other])
    assert kept == (tmp_path / "sweep" / "s" / "results.json").read_bytes()
    results = json.loads((tmp_path / "sweep" / "s" / "results.json").read_text())
    point, low, high = results["variants"]["g1"]["train_accuracy_summary"]["first task"]
    first = summaries[tmp_path / "cl" / "s" / "g1" / "seed-0" / "summary.json"]["tasks"][0]
    assert (point, low, high) == (first["train_accuracy"], None, None)


def test_sweep_reports_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="variant 'x' must read"):
        sweep.main(["cl", "--variants", "x", "--runs-dir", str(tmp_path)])
    argv = ["cl", "--name", "s", "--seeds", "1", "--jobs", "1", "--runs-dir", str(tmp_path),
            "--variants", "bad: --granularity 0", "--", *FLAGS.split()]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run_command(sweep.main, argv)
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "bad, seed 0: granularity 0 must be at least 1" in error[0]

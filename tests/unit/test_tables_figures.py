"""What is made of finished runs: tables, figures, and the results of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cl_benchmarks.experiment import ContinualLearning, _print_tasks
from dynmoe import sweep
from dynmoe.errors import UserError
from dynmoe.lab import figures
from dynmoe.lab.config import run_command
from dynmoe.lab.experiment import Results
from dynmoe.lab.figures import as_image, looks, new_figure
from dynmoe.lab.report import fit, print_table, table
from dynmoe.lab.runner import chance_of

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


def _results(**variants: list[list[float]]) -> Results:
    """Variants with the train accuracies [S][T] of their runs."""
    runs = {name: [{"tasks": _tasks(*seed)} for seed in seeds] for name, seeds in variants.items()}
    return Results({"": runs}, {}, ContinualLearning())


def _draw(path: Path, **variants: list[list[float]]) -> None:
    ContinualLearning().draw(path, _results(**variants), "digits")


def _cells(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def _colors(path: Path) -> set[tuple[int, ...]]:
    """Colours in a PNG file; reading it checks all of it."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size >= (800, 250)
        colors = image.convert("RGB").getcolors(image.width * image.height)
        return {color for _, color in colors}


def _shows(path: Path, color: str | tuple[int, ...]) -> bool:
    """Whether a figure has a colour, but for the rounding of its palette."""
    wanted = _rgb(color) if isinstance(color, str) else color
    return any(
        all(abs(x - y) <= 3 for x, y in zip(own, wanted, strict=True)) for own in _colors(path)
    )


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_figures_show_a_line_per_method(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    _draw(one, dense=[[0.9, 0.5]])
    assert _shows(one, COLORS[0]) and not _shows(one, COLORS[1])
    _draw(two, dense=[[0.9, 0.5]], fresh=[[0.2, 0.4]])
    assert _shows(two, COLORS[0]) and _shows(two, COLORS[1])
    _draw(one, one_task=[[0.9]])
    assert _shows(one, COLORS[0])
    _draw(one, **{f"method_{i}": [[0.1 * i, 0.05 * i]] for i in range(len(COLORS) + 2)})
    assert all(_shows(one, color) for color in COLORS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_seeds_are_shown_as_a_band(tmp_path: Path) -> None:
    _draw(tmp_path / "wide.png", a=[[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    _draw(tmp_path / "none.png", a=[[0.5, 0.5]] * 3)
    light = tuple(round(0.85 * 255 + 0.15 * x) for x in _rgb(COLORS[0]))
    assert _shows(tmp_path / "wide.png", light) and not _shows(tmp_path / "none.png", light)


def test_a_method_has_its_colour_in_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "COLORS", tuple("0123456789"))
    one, two = looks(["dynamicmoe", "dense", "mine"]), looks(["x", "mine", "dense", "dynamicmoe"])
    assert [own["dynamicmoe"].color for own in (one, two)] == ["4", "4"]
    assert [own["dense"].color for own in (one, two)] == ["0", "0"]
    assert [two["x"].color, two["mine"].color] == ["1", "2"]  # what is left, in order
    many = looks(map(str, range(24)))
    assert len(set(many.values())) == 24  # also where colours come again
    assert len({(look.line, look.mark) for look in list(many.values())[:10]}) == 10  # in gray


def test_a_study_has_its_figure_as_pdf_and_svg_too(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        token = figures.VECTORS.set(True)
        _draw(tmp_path / name / "figure.png", dense=[[0.9, 0.5]])
        figures.VECTORS.reset(token)
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert files[0] == files[1] and sorted(files[0]) == ["figure.pdf", "figure.png", "figure.svg"]
    assert files[0]["figure.pdf"].startswith(b"%PDF") and b"dense" in files[0]["figure.svg"]


ODD = ("net [dense]", "off [/moe]", r"lr $\eta_$", ":x: $a$ [b]")
"""Labels with signs that mean something to rich or to matplotlib."""


def test_labels_are_printed_and_drawn_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(ODD[1], [["method", ODD[1]], *([label, "1"] for label in ODD)], ODD[1])
    out = capsys.readouterr().out
    assert out.count(ODD[1]) == 4 and all(label in out for label in ODD)
    results = _results(**{label: [[0.9, 0.5]] for label in ODD})
    wide = table(results, "", difference=True)
    assert all(label in [row[0] for row in fit(wide, 60)[0]] for label in ODD)
    token = figures.VECTORS.set(True)
    ContinualLearning().draw(tmp_path / "figure.png", results, ODD[2])
    figures.VECTORS.reset(token)
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(label in drawn for label in ODD) and drawn.count(ODD[2]) == 2


def test_numbers_of_a_logarithmic_axis_stay_formulas() -> None:
    figure = new_figure("$x$", 3)
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(1, 1000), title="$x$")
    as_image(figure)
    assert all(text.get_parse_math() for text in axes.get_xticklabels())
    assert not axes.title.get_parse_math()


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    _print_tasks({"tasks": _tasks(0.9, 0.505)}, "dense: digits")
    out = capsys.readouterr().out
    assert "dense: digits" in out
    assert _cells(out) == [
        ["1", "90.0 %", "45.0 %", "22.5 %", "2", "12,345"],
        ["2", "50.5 %", "25.2 %", "12.6 %", "4", "12,345"],
    ]
    rows = table(_results(dense=[[0.9, 0.5, 0.7]], fresh=[[0.6, 0.6, 0.6]]), "")
    print_table("digits", rows)
    assert _cells(capsys.readouterr().out) == rows[1:]
    assert rows[0][1:5] == ["first task", "last task", "mean", "per task"]
    assert rows[1] == ["dense", "90.0", "70.0", "70.0", "-10.0", "17.5", "35.0"]
    assert rows[2][:5] == ["fresh", "60.0", "60.0", "60.0", "0.0"]


def test_a_table_of_several_seeds_has_intervals_and_differences() -> None:
    own, other = [[0.5, 0.9], [0.5, 0.7], [0.5, 0.8]], [[0.5, 0.8], [0.5, 0.6], [0.5, 0.7]]
    rows = table(_results(own=own, other=other), "", difference=True)
    assert rows[0][-1] == "train accuracy minus own"
    assert rows[1][1:3] == ["50.0 [50.0, 50.0]", "80.0 [55.2, 104.8]"] and rows[1][-1] == ""
    assert rows[2][-1] == "-10.0 [-10.0, -10.0]"  # the same for every seed


def test_a_wide_table_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all its numbers: on two lines first, then in several tables."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"number {n}" for n in range(8)]
    values = [[f"{10 * n + row}.5 [{n}.0, {row}7.0]" for n in range(8)] for row in range(2)]
    rows = [["method", *names], ["dense", *values[0]], ["expansion", *values[1]]]
    narrow = [row[:5] for row in rows]
    assert fit(rows, 300) == [rows] and len(fit(narrow, 80)) == 1 and len(fit(rows, 80)) == 2
    for part in fit(rows, 80):
        assert [row[0] for row in part] == ["method", "dense", "expansion"]
    print_table("all of it", rows, "two seeds")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("all of it") == out.count("two seeds") == 1
    for cell in (*values[0], *values[1]):
        assert all(out.count(piece) >= 1 for piece in cell.split(" ", 1))


def test_lesser_columns_lose_their_intervals_before_a_table_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"number {n}" for n in range(6)]
    rows = [["method", *names], ["a", *(f"1{n}.5 [-10.0, 2{n}.0]" for n in range(6))]]
    print_table("all of it", rows, "two seeds", lesser=names[1:5])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and out.count("┏") == 1
    assert [out.count(f"2{n}.0]") for n in range(6)] == [1, 0, 0, 0, 0, 1]
    assert all(f"1{n}.5" in out for n in range(6)) and "a wider terminal" in out
    print_table("all of it", [row[:5] for row in rows], "two seeds", lesser=names)
    assert "[-10.0, 24.0]" not in (out := capsys.readouterr().out) and "wider" not in out
    assert out.count("-10.0") == 4  # they fit as they are


FLAGS = "--preset smoke --chunks 2 --epochs 2 --eval-samples 60 --probe-samples 40"


def test_the_level_of_guesses_is_drawn_where_the_axes_show_it() -> None:
    figure = figures.new_figure("", 3)
    near, far, across = figure.subplots(1, 3)
    near.set_ylim(0, 103)
    far.set_ylim(55, 60)
    across.set_xlim(0, 60)
    for axes, level in ((near, None), (near, 0.05), (far, 0.05)):
        figures.chance_line(axes, level)
    figures.chance_line(across, 0.25, across=True)
    (line,), (upright,) = near.lines, across.lines
    assert set(line.get_ydata()) == {5.0} and line.get_label() == "chance"
    assert set(upright.get_xdata()) == {25.0}
    assert not far.lines and far.get_ylim() == (55, 60)
    assert figures.told_chance([0.1, 0.1, 1 / 3]) == "; chance: 10 % or 33.3 %"
    assert figures.told_chance([]) == ""


def test_a_level_that_runs_do_not_know_or_agree_on_is_not_told() -> None:
    runs = {
        "known": {"a": [{"chance": 0.1}, {"chance": 0.1}], "b": [{"chance": 0.1}]},
        "of before": {"a": [{"chance": 0.1}, {}]},
        "two": {"a": [{"chance": 0.1}], "b": [{"chance": 0.2}]},
        "none": {"a": [{}]},
    }
    assert chance_of(runs) == {"known": 0.1}


@pytest.mark.slow
def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cl", "--name", "s", "--seeds", "2", "--jobs", "1", "--runs-dir", str(tmp_path),
            "--variants", "plain: --method dense", "g1: --granularity 1", "--",
            *FLAGS.split()]  # fmt: skip
    sweep.main(argv)
    out = capsys.readouterr().out
    folder = tmp_path / "sweep" / "s"
    results = json.loads((folder / "results.json").read_text())
    assert FLAGS in results["command"] and results["seeds"] == 2
    assert results["chance"] == {"": 0.1}  # digits
    variants = results["streams"][""]
    assert list(variants) == ["plain", "g1"]
    summaries = {p: json.loads(p.read_text()) for p in tmp_path.rglob("summary.json")}
    assert len(summaries) == 4
    for entry in variants.values():
        runs = [summaries[tmp_path / "cl" / "studies" / entry["runs"] / f"seed-{s}/summary.json"]
                for s in (0, 1)]  # fmt: skip
        tasks = [[round(task["train_accuracy"], 4) for task in run["tasks"]] for run in runs]
        assert entry["train_accuracy"] == tasks and tasks[0] != tasks[1]
        for at, values in (
            ("first", [t[0] for t in tasks]),
            ("last", [t[-1] for t in tasks]),
            ("mean", [sum(t) / len(t) for t in tasks]),
        ):
            point, low, high = entry[f"train_accuracy_{at}"]
            assert point == pytest.approx(sum(values) / 2, abs=2e-4)
            reach = 12.7062 * abs(values[1] - values[0]) / 2  # t of one degree of freedom
            assert [low, high] == pytest.approx([point - reach, point + reach], abs=2e-3)
    assert f"{100 * variants['plain']['train_accuracy_last'][0]:.1f}" in out
    assert "g1 against plain" in out and "g1 against plain" in (folder / "study.md").read_text()
    assert _colors(folder / "figure.png")

    times = {p: p.stat().st_mtime_ns for p in summaries}
    logs = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("log.jsonl")}
    sweep.main([*argv[:4], "1", *argv[5:]])  # of one seed now
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}
    assert logs == {p: p.stat().st_mtime_ns for p in logs}
    results = json.loads((folder / "results.json").read_text())
    entry = results["streams"][""]["g1"]
    assert entry["train_accuracy_first"] == [entry["train_accuracy"][0][0], None, None]
    sweep.main([*argv[:4], "1", *argv[5:], "--epochs", "1"])  # other settings are other runs
    assert (
        times.items() <= {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}.items()
    )
    assert len(list(tmp_path.rglob("summary.json"))) == 6


def test_sweep_reports_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="variant 'x' must read"):
        sweep.main(["cl", "--variants", "x", "--runs-dir", str(tmp_path)])
    argv = ["cl", "--name", "s", "--seeds", "1", "--jobs", "1", "--runs-dir", str(tmp_path),
            "--variants", "bad: --granularity 0", "worse: --granularity 0 --lr 0.1", "--",
            *FLAGS.split()]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run_command(sweep.main, argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("failed")]
    assert len(told) == 2 and "bad, seed 0: granularity 0 must be at least 1" in told[0]
    assert "worse, seed 0: granularity 0" in told[1] and told[1].endswith("(exit code 2)")
    error = [line for line in lines if line.startswith("error")]
    assert len(error) == 1 and error[0].startswith("error: 2 runs failed")
    assert not list(tmp_path.rglob("seed-*"))  # they never began


def test_the_final_table_of_one_seed_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its calibration, on streams whose old tasks cannot be tested again."""
    monkeypatch.setenv("COLUMNS", "80")
    own = {"ece": 0.467, "adaptive_ece": 0.466}
    runs = {name: [{"tasks": [row | own for row in _tasks(1.0, accuracy)]}]
            for name, accuracy in (("dynamicmoe", 1.0), ("dense", 0.168))}  # fmt: skip
    rows = table(Results({"": runs}, {}, ContinualLearning()), "")
    assert rows[0][-2:] == ["ECE", "ECE, ad."]
    print_table("all of it", rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and out.count("┏") == 1

"""README's Python runs as pasted, and the loop on the results page ends where the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "README.md"


def snippet(page: Path) -> str:
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return block


def accuracies(code: str, capsys: pytest.CaptureFixture[str]) -> list[float]:
    exec(compile(code, "results", "exec"), {})
    return [float(text) for text in re.findall(r"accuracy ([\d.]+)%", capsys.readouterr().out)]


def test_the_readme_s_snippet_grows(capsys):
    names: dict = {}
    exec(compile(snippet(README), "README.md", "exec"), names)
    assert names["model"][1].num_experts == 4
    assert float(capsys.readouterr().out) > 1


def test_the_readme_quotes_the_results():
    """Its five lines have the numbers of the pages that they link to."""
    text = README.read_text()
    for page, numbers in (
        (RESULTS, ("9.9", "97.7", "100.0", "28.8", "17.1", "25.4")),
        (RESULTS.with_name("rl.md"), ("33.4", "29.6", "33.5", "31.4")),
        (RESULTS.with_name("tta.md"), ("39.4", "36.2", "35.2")),
        (RESULTS.with_name("dg.md"), ("58.5", "57.9", "60.3", "66.7")),
    ):
        for number in numbers:
            assert re.search(rf"\b{re.escape(number)}\b", text), number
            assert re.search(rf"\b{re.escape(number)}\b", page.read_text()), number


SWEEP = RESULTS.with_name("studies") / "trainability" / "results.json"
ROWS = {  # variant of the sweep -> the beginnings of its rows on the two pages
    "dense": ("dense network", "dense"),
    "fresh": ("fresh network for each task", "fresh (new network per task)"),
    "g2": ("growing network", "**DynamicMoE g2** (default)"),
}


@pytest.mark.parametrize("variant", ROWS)
def test_the_tables_of_trainability_are_those_of_the_sweep(variant: str) -> None:
    """Of both pages, to a digit after the point."""
    streams = json.loads(SWEEP.read_text())["streams"]
    for page, name in zip((README, RESULTS), ROWS[variant], strict=True):
        text = page.read_text().partition("## Does growing keep trainability?")
        row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text[2] or text[0], re.MULTILINE)
        assert row is not None, name
        cells = [[float(x) for x in re.findall(r"-?[\d.]+", c)] for c in row.group(1).split("|")]
        for cell, stream in zip(cells, ("class", "shuffle", "noise"), strict=True):
            found = streams[f"protocol {stream}"][variant]["train_accuracy_last"]
            assert cell == pytest.approx([100 * x for x in found][: len(cell)], abs=0.06), stream


def test_the_loop_runs(capsys):
    """With one epoch a task, for the time it takes."""
    code = snippet(RESULTS)
    assert code.count("EPOCHS = 20") == 1
    found = accuracies(code.replace("EPOCHS = 20", "EPOCHS = 1"), capsys)
    assert len(found) == 10 and max(found) > 5


@pytest.mark.slow
def test_the_loop_gives_the_default_row(capsys):
    bold = re.search(r"\*\*DynamicMoE g2\*\* \(default\) \| ([\d.]+) ", RESULTS.read_text())
    assert bold is not None
    found = accuracies(snippet(RESULTS), capsys)
    assert found[-1] == float(bold.group(1))

"""The README's Python snippet runs as pasted, and ends where the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def snippet() -> str:
    [block] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return block


def accuracies(code: str, capsys: pytest.CaptureFixture[str]) -> list[float]:
    exec(compile(code, "README.md", "exec"), {})
    return [float(text) for text in re.findall(r"accuracy ([\d.]+)%", capsys.readouterr().out)]


def test_the_snippet_runs(capsys):
    """With one epoch a task, for the time it takes."""
    code = snippet()
    assert code.count("EPOCHS = 20") == 1
    found = accuracies(code.replace("EPOCHS = 20", "EPOCHS = 1"), capsys)
    assert len(found) == 10 and max(found) > 5


@pytest.mark.slow
def test_the_snippet_gives_the_default_row(capsys):
    bold = re.search(r"\*\*DynamicMoE g2\*\* \(default\) \| ([\d.]+) ", README.read_text())
    assert bold is not None
    found = accuracies(snippet(), capsys)
    assert found[-1] == float(bold.group(1))

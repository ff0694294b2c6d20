"""The notebooks run from top to bottom, and show what they say.

Their code cells are run as one script in a process of its own: no notebook server is needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def after(text: str, label: str) -> list[float]:
    """The numbers of the line that begins with a label."""
    [line] = [line for line in text.splitlines() if line.startswith(label)]
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", line.removeprefix(label))]


def test_notebooks_are_linked_and_without_outputs() -> None:
    page = (ROOT / "docs" / "howto" / "index.md").read_text()
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        assert f"(../notebooks/{path.name})" in page
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", "\n".join(cells(path, "markdown"))):
            assert link.startswith("https://") or (FOLDER / link).is_file(), link


def run(name: str, folder: Path) -> str:
    """What a notebook prints; its last figure is drawn."""
    code = "\n\n".join(cells(FOLDER / f"{name}.ipynb", "code"))
    (folder / "notebook.py").write_text(f"{code}\n\nplt.savefig('figure.png')\n")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "notebook.py"], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "figure.png").stat().st_size > 10_000
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_own_loop(tmp_path: Path) -> None:
    out = run("own_loop", tmp_path)
    dense, growing = after(out, "dense:"), after(out, "growing:")
    assert dense[0] > 90 and dense[1] < dense[0] - 5
    assert growing[1] > 95
    assert list((tmp_path / "runs" / "own-loop" / "growing").glob("events.*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_avalanche_replay(tmp_path: Path) -> None:
    out = run("avalanche_replay", tmp_path)
    names = ("Naive, growing:", "Replay, growing:", "Replay, dense:")
    naive, growing, dense = (after(out, name)[0] for name in names)
    assert naive < 25 and naive < growing < dense


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ppo(tmp_path: Path) -> None:
    out = run("ppo", tmp_path)
    first, last, most = after(out, "return: first")
    assert first < 10 and last > 0.8 * most
    assert len(after(out, "growths at steps")) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_timm_adapt(tmp_path: Path) -> None:
    out = run("timm_adapt", tmp_path)
    source = after(out, "no adaptation:")[0]
    assert source < 70 and after(out, "tent:")[0] > source + 20

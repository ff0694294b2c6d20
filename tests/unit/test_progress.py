"""The progress line without and with a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe.lab.progress import ProgressLine

ROOT = Path(__file__).parents[2]


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("dense", 100, "batches") as progress:
        progress.began -= 10  # as if ten seconds had passed
        progress.start_at(20)
        assert not progress.due(99)
        progress.printed -= 10
        assert progress.due(70)
        progress.update(70, task="2/5", loss=0.12345)
        assert not progress.due(71) and progress.due(100)
        progress.update(100)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines == [
        "dense: 70/100 batches, 5/s, 6 s left task=2/5 loss=0.123",
        "dense: 100/100 batches, 8/s, 0 s left",
    ]


def test_one_live_line_on_a_terminal() -> None:
    code = (
        "from dynmoe.lab.progress import ProgressLine\n"
        "with ProgressLine('[/moe] dense', 4) as progress:\n"
        "    progress.update(4, experts=6)\n"
    )
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=terminal, check=True
    )
    os.close(terminal)
    shown = os.read(main, 65536).decode()
    os.close(main)
    assert "[/moe] dense" in shown and "4/4" in shown and "experts=6" in shown
    assert "s left" not in shown  # the form for files

"""Stored runs of each command: they still load, and still give the numbers that they gave.

A change that is meant to change numbers makes them again: `tests/golden/make.py`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = 0.02
"""Relative or absolute: another processor rounds otherwise, and a sample may change its class."""


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(found: Any, stored: Any, where: str) -> None:
    """The same names and lengths, and numbers near each other, however deep."""
    if isinstance(stored, dict):
        assert isinstance(found, dict) and found.keys() == stored.keys(), where
        for name in stored:
            assert_close(found[name], stored[name], f"{where}/{name}")
    elif isinstance(stored, list):
        assert isinstance(found, list) and len(found) == len(stored), where
        for i, pair in enumerate(zip(found, stored, strict=True)):
            assert_close(*pair, f"{where}/{i}")
    elif isinstance(stored, float) and found is not None:
        assert found == pytest.approx(stored, rel=CLOSE, abs=CLOSE), where
    else:
        assert found == stored, where


@pytest.mark.parametrize("command", ["cl", "dg", "tta", "rl"])
def test_a_stored_run_goes_on_as_it_did(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = _maker()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / maker.FOLDERS[command]
    shutil.copytree(GOLDEN / command, folder, ignore=shutil.ignore_patterns("whole*", "summary*"))
    maker.carry_out(command, "--resume")
    whole = [json.loads(line) for line in (GOLDEN / command / "whole.jsonl").open()]
    assert_close([json.loads(line) for line in (folder / "log.jsonl").open()], whole, "log")
    stored = json.loads((GOLDEN / command / "summary.json").read_text())
    assert_close(json.loads((folder / "summary.json").read_text()), stored, "summary")
    kept = (GOLDEN / command / "log.jsonl").read_bytes()
    assert (folder / "log.jsonl").read_bytes().startswith(kept) and len(whole) > kept.count(b"\n")

"""What the tests of commands share: running one in this process, and comparing what it left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynmoe.lab import checkpoint
from dynmoe.lab.config import run_command


def exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a command in this process."""
    try:
        run_command(main, argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def stop_at(patch: pytest.MonkeyPatch, recorder: type[Any], moment: str, every: int = 1) -> None:
    """Let SIGTERM arrive at every `every`-th call of a recorder's method, over all sessions."""
    original, calls = getattr(recorder, moment), 0

    def signalled(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    patch.setattr(recorder, moment, signalled)


def error_line(err: str) -> str:
    """The one error line of a command's stderr."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """A run's newest checkpoint, but for the sizes of event files: each session has its own."""
    saved = checkpoint.load_latest(folder / "checkpoints")
    assert saved is not None
    return {name: value for name, value in saved.items() if name != "event_sizes"}


def assert_same(one: object, two: object, where: str = "") -> None:
    """Equal in every tensor and value, however deep."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert isinstance(two, torch.Tensor)
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert isinstance(two, dict) and one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(two, list | tuple) and len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert one == two, where

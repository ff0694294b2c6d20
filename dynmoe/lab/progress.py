"""Lines of progress, plain ones without a terminal: of one run's steps, and of many runs."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dynmoe.lab import torchrun

LIVE_INTERVAL_S, PLAIN_INTERVAL_S = 0.2, 10.0
"""Seconds between two updates, on a terminal and elsewhere."""


class ProgressLine:
    """Progress of `total` steps on stderr. Use as a context manager.

    Args:
        label: what is running.
        total: steps in all.
        unit: what a step is, in the plural.
    """

    def __init__(self, label: str, total: int, unit: str = "steps") -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, 0
        self.began = self.printed = time.monotonic()
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not (self._live and torchrun.first()),
        )
        self._task = self._bar.add_task(label, total=total, rate="", figures="")

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start_at(self, step: int) -> None:
        """Steps already done when resuming, which the rate must not count."""
        self.start = step

    def due(self, step: int) -> bool:
        """Whether it is time to show something; ask before working out the figures."""
        if not torchrun.first():
            return False
        interval = LIVE_INTERVAL_S if self._live else PLAIN_INTERVAL_S
        return time.monotonic() - self.printed >= interval or step >= self.total

    def update(self, step: int, **figures: Any) -> None:
        """Show that `step` steps are done; figures are shown as given, floats with 3 digits."""
        if not torchrun.first():
            return
        now = self.printed = time.monotonic()
        rate = (step - self.start) / max(now - self.began, 1e-9)
        shown = " ".join(
            f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()
        )
        if self._live:
            speed = f"{rate:.0f} {self.unit}/s"
            self._bar.update(self._task, completed=step, rate=speed, figures=shown)
        else:
            left = (self.total - step) / max(rate, 1e-9)
            done = f"{step}/{self.total} {self.unit}"
            line = f"{self.label}: {done}, {rate:.0f}/s, {left:.0f} s left {shown}"
            print(line.rstrip(), file=sys.stderr, flush=True)


class RunsShown:
    """How many of `total` runs are done, on stderr, with the time left. Use as a context manager.

    Args:
        title: what they belong to.
        total: runs in all.
        done: those that were finished before.
    """

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title = title
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, failed="")

    def __enter__(self) -> RunsShown:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def ended(self, label: str, failure: str | None, failed: int) -> None:
        """A run has ended: well, or with a message; `failed` runs have failed up to now."""
        if failure is None:
            self._bar.advance(self._task)
        self._bar.update(self._task, failed=f"{failed} failed" if failed else "")
        if not self._live:
            how = "done" if failure is None else f"failed: {failure}"
            print(f"{self.title}: {label} {how}", file=sys.stderr, flush=True)

"""What a run writes down: TensorBoard for people, `log.jsonl` for programs.

TensorBoard shows what the run's board names (`dynmoe.lab.board`), `log.jsonl` has everything.

Both are cut back to what a checkpoint knows of when a run goes on, so that they always agree.
`log.jsonl` has one JSON object per line: `{"step": 120, "loss": 0.3, ...}` for metrics and
`{"step": 120, "event": "growth", ...}` for events. It holds no times, so a resumed run's file is
byte for byte the uninterrupted one's.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dynmoe.lab.board import Board, Everything
from dynmoe.lab.early_stop import Bar
from dynmoe.lab.files import FULL, disk_full, finite

EVENTS = "events.out.tfevents."
"""How the names of TensorBoard's files begin; the second at which they were made follows."""


class Logger:
    """Writes metrics and events of one run.

    Args:
        folder: the run's folder.
        position: bytes of `log.jsonl` to keep, when resuming; the rest is cut off.
        step: the step resumed from, or None to start over. A TensorBoard that has already read
            what is cut off hides what came after this step.
        events: bytes of each of TensorBoard's files to keep, when resuming; a file that is not
            named is deleted. None, of runs before this was saved, keeps all.

    Attributes:
        bar: what the metrics have to reach; None: nothing.
        board: which metrics TensorBoard shows; all until `use` is called.
    """

    def __init__(
        self,
        folder: Path,
        position: int = 0,
        step: int | None = None,
        events: dict[str, int] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if step is None:  # what an attempt without any checkpoint left behind
            events = {}
        if events is not None:
            _cut_back(folder, events)
        _put_before_now(folder)
        self.folder = folder
        self.path = folder / "log.jsonl"
        self._file: IO[bytes] = open(self.path, "ab")  # noqa: SIM115 - closed in close()
        self._file.truncate(position)
        self._file.seek(position)  # else `tell` counts what was cut off until the next write
        self._latest = step or 0
        purge = None if step is None else step + 1
        self.tensorboard: Any = SummaryWriter(str(folder), purge_step=purge)
        self.bar: Bar | None = None
        self.board: Board = Everything()

    def use(self, board: Board) -> None:
        """Show what this board names, and its charts of several lines."""
        self.board = board
        if board.lines:
            self.tensorboard.add_custom_scalars(board.layout())

    def scalars(self, step: int, values: dict[str, float], place: int | None = None) -> None:
        """One line of metrics, and one TensorBoard point per chart of the board, all in one event.

        Args:
            step: of the run.
            values: tag -> number.
            place: on TensorBoard's axis, such as the number of a task; None: the step.

        Raises:
            Pruned: they do not reach the bar.
        """
        self._write({"step": step, **values})
        self._latest = step
        self.show(step if place is None else place, self.board.points(values))
        if self.bar is not None:
            self.bar.check(step, values)

    def show(self, place: int, points: dict[str, float]) -> None:
        """Points for TensorBoard alone: chart -> number; none at all where there are none."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if points:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
            self.tensorboard._get_file_writer().add_summary(Summary(value=values), place)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """A picture for TensorBoard alone: uint8 [3, H, W]."""
        self.tensorboard.add_image(tag, image, step)

    def event(self, step: int, name: str, values: dict[str, Any]) -> None:
        """One line for something that happened once (a growth, a new task)."""
        self._write({"step": step, "event": name, **values})
        told = "\n".join(f"- {key}: `{json.dumps(value)}`" for key, value in values.items())
        self.tensorboard.add_text(f"events/{name}", told, step)

    def hparams(self, settings: dict[str, Any], final: dict[str, float]) -> None:
        """For TensorBoard's tab HPARAMS alone: settings, and what the run ended with.

        Args:
            settings: flat; what is no number or text is shown as text.
            final: tag -> number.
        """
        from torch.utils.tensorboard.summary import hparams

        shown = {k: v if type(v) in (int, float, str) else str(v) for k, v in settings.items()}
        writer = self.tensorboard._get_file_writer()
        for part in hparams(shown, final):
            writer.add_summary(part)
        self.show(self._latest, final)

    def sync(self) -> int:
        """Flush to disk; returns the length of `log.jsonl` in bytes.

        Raises:
            ResourceError: the disk is full.
            OSError: it cannot be written for another reason, see `dynmoe.lab.files.as_told`.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.tensorboard.flush()
            for path in _event_files(self.folder):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise disk_full(self.path, 0) from error
        return self._file.tell()

    def event_sizes(self) -> dict[str, int]:
        """Bytes of each of TensorBoard's files; call `sync` before."""
        return {_own_name(path): path.stat().st_size for path in _event_files(self.folder)}

    def close(self, failed: bool = False) -> None:
        """Flush and close both; of a run that failed before its first line, TensorBoard's go."""
        empty = self.sync() == 0
        self._file.close()
        self.tensorboard.close()
        if failed and empty:
            _cut_back(self.folder, {})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write((json.dumps(finite(line)) + "\n").encode())
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise disk_full(self.path, 0) from error


class SilentLogger(Logger):
    """Writes nothing: that of the processes that share a run with the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bar = folder, None
        self.tensorboard = _Silent()

    def use(self, board: Board) -> None:
        """Nothing."""

    def scalars(self, step: int, values: dict[str, float], place: int | None = None) -> None:
        """Nothing."""

    def show(self, place: int, points: dict[str, float]) -> None:
        """Nothing."""

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Nothing."""

    def event(self, step: int, name: str, values: dict[str, Any]) -> None:
        """Nothing."""

    def hparams(self, settings: dict[str, Any], final: dict[str, float]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """0."""
        return 0

    def close(self, failed: bool = False) -> None:
        """Nothing."""


class _Silent:
    """In place of a SummaryWriter."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{EVENTS}*"))


def _own_name(path: Path) -> str:
    """The name that a file had at first, see `_put_before_now`."""
    return re.sub(rf"^{re.escape(EVENTS)}0000\d{{6}}\.", EVENTS, path.name)


def _cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Cut TensorBoard's files to these sizes, and delete those without one."""
    for path in _event_files(folder):
        size = sizes.get(_own_name(path))
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


def _put_before_now(folder: Path) -> None:
    """Have TensorBoard read the files that are there before the one that is made now.

    It goes by their names, which begin with the time; after a clock was set back, or within the
    same second, the order would be wrong. Then those that are there get numbers before their time.
    """
    files = _event_files(folder)
    if files and files[-1].name >= f"{EVENTS}{int(time.time()):010d}":
        for number, path in enumerate(files):
            path.rename(folder / f"{EVENTS}{number:010d}.{_own_name(path).removeprefix(EVENTS)}")

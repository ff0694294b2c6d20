"""The log: one JSON object a line, cut back to what a checkpoint knows of when a run goes on."""

from __future__ import annotations

import errno
import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab import log
from dynmoe.lab.board import Board
from dynmoe.lab.config import RunConfig
from dynmoe.lab.log import Logger
from dynmoe.lab.run import Run


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_lines_and_points(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.scalars(1, {"loss": 0.5, "a/b": 2.0})
    logger.event(1, "growth", {"experts": 4, "sizes": {"x": [1, 2]}})
    logger.scalars(2, {"loss": float("nan")})
    logger.close()
    assert _lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "a/b": 2.0},
        {"step": 1, "event": "growth", "experts": 4, "sizes": {"x": [1, 2]}},
        {"step": 2, "loss": None},
    ]
    shown = _scalars(tmp_path)
    assert shown["a/b"] == [(1, 2.0)] and shown["loss"][0] == (1, 0.5)


BOARD = Board({
    "1 task": {"accuracy": "task/accuracy"},
    "2 layers": {"entropy": "entropy/.*", r"loss of \1": r"(\w+)/loss", "experts": ""},
})  # fmt: skip


def test_a_board_names_what_it_shows_and_log_jsonl_keeps_the_rest(tmp_path: Path) -> None:
    values = {"task/accuracy": 0.5, "entropy/a": 1.0, "entropy/b": 3.0, "x/loss": 4.0, "y/z": 5.0}
    logger = Logger(tmp_path)
    logger.use(BOARD)
    logger.scalars(70, values, place=2)
    logger.scalars(80, {"y/z": 6.0, "my task/accuracy": 0.1})  # nothing to show
    logger.close()
    assert _lines(tmp_path)[0] == {"step": 70, **values} and len(_lines(tmp_path)) == 2
    assert _scalars(tmp_path) == {
        "1 task/accuracy": [(2, 0.5)], "2 layers/entropy": [(2, 2.0)],
        "2 layers/loss of x": [(2, 4.0)],
    }  # fmt: skip


def test_a_run_that_fails_at_its_start_leaves_nothing_to_tensorboard(tmp_path: Path) -> None:
    def fail(lines: int) -> None:
        with Run("cl", "x", RunConfig(runs_dir=tmp_path, name=str(lines))) as run:
            run.log.use(BOARD)
            if lines:
                run.log.scalars(1, {"task/accuracy": 0.5})
            raise UserError("no")

    for lines in (0, 1):
        with pytest.raises(UserError):
            fail(lines)
        files = (tmp_path / "cl" / str(lines) / "seed-0").glob("events.out.tfevents.*")
        assert len(list(files)) == lines


def test_going_on_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = Logger(tmp_path)
    first.scalars(1, {"loss": 1.0})
    position = first.sync()
    assert position == (tmp_path / "log.jsonl").stat().st_size > 0
    first.scalars(2, {"loss": 2.0})
    first.scalars(3, {"loss": 3.0})
    first.close()
    assert len(_lines(tmp_path)) == 3

    second = Logger(tmp_path, position, step=1)
    assert len(_lines(tmp_path)) == 1
    assert second.sync() == position  # a checkpoint before anything new is logged
    second.scalars(2, {"loss": 2.5})
    end = second.sync()
    assert end == (tmp_path / "log.jsonl").stat().st_size
    second.close()
    assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]
    assert _scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.5)]}

    third = Logger(tmp_path)  # a new one
    third.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""
    assert _scalars(tmp_path) == {}


def test_what_was_logged_at_the_checkpoints_own_step_is_shown_once(tmp_path: Path) -> None:
    """Before it or after it, scalars, texts and pictures, also when the run is stopped twice."""

    def after(logger: Logger, value: float) -> None:
        logger.scalars(5, {"task": value})
        logger.event(5, "growth", {"experts": value})
        logger.image(5, "map", torch.full((3, 4, 4), int(value), dtype=torch.uint8))
        logger.scalars(4, {"late": value})  # of an earlier step, but after the checkpoint

    first = Logger(tmp_path)
    first.scalars(5, {"epoch": 1.0})
    position, sizes = first.sync(), first.event_sizes()
    after(first, 1.0)
    first.close()
    for value in (2.0, 3.0):
        again = Logger(tmp_path, position, 5, sizes)
        after(again, value)
        again.close()
    scalars = _scalars(tmp_path)
    assert scalars == {"epoch": [(5, 1.0)], "task": [(5, 3.0)], "late": [(4, 3.0)]}
    lines = [(line["step"], key, value) for line in _lines(tmp_path)
             for key, value in line.items() if key in scalars]  # fmt: skip
    assert sorted(lines) == sorted((s, tag, v) for tag, ps in scalars.items() for s, v in ps)
    assert [step for step, _ in _images(tmp_path)["map"]] == [5]


@pytest.mark.parametrize("back", [0, 3600])
def test_a_clock_that_is_set_back_changes_no_order(
    back: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's files are named after the time, and read in the order of their names.

    Twelve sessions, each of which begins an hour before the one before it, or at the same time.
    """
    times = iter(range(1_800_000_000, 0, -back) if back else itertools.repeat(1_800_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    position, sizes = 0, dict[str, int]()
    for step in range(1, 13):
        logger = Logger(tmp_path, position, step - 1 if step > 1 else None, sizes)
        logger.scalars(step, {"loss": float(step)})
        if step != 5:  # that session is killed before it saves
            position, sizes = logger.sync(), logger.event_sizes()
        logger.close()
    expected = [(step, float(step)) for step in range(1, 13) if step != 5]
    assert _scalars(tmp_path) == {"loss": expected}
    assert [line["step"] for line in _lines(tmp_path)] == [step for step, _ in expected]


def test_a_file_of_tensorboard_that_lost_its_end_is_left_as_it_is(tmp_path: Path) -> None:
    first = Logger(tmp_path)
    first.scalars(1, {"loss": 1.0})
    position, sizes = first.sync(), first.event_sizes()
    first.close()
    (name,) = sizes
    second = Logger(tmp_path, position, 1, {name: sizes[name] + 100})
    second.scalars(2, {"loss": 2.0})
    second.close()
    assert _scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}


def _images(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


def test_images_are_shown_once_each_and_leave_the_lines_alone(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)
    first = Logger(tmp_path)
    first.image(1, "experts/a", pictures[0])
    position = first.sync()
    first.image(2, "experts/a", pictures[1])
    first.close()
    second = Logger(tmp_path, position, step=1)
    second.image(2, "experts/a", pictures[2])
    second.close()
    shown = _images(tmp_path)["experts/a"]
    assert [step for step, _ in shown] == [1, 2]
    for (_, png), picture in zip(shown, pictures[[0, 2]], strict=True):
        pixels = np.array(Image.open(io.BytesIO(png)))
        assert torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), picture)
    assert position == 0 and _lines(tmp_path) == []


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Logger(tmp_path)
    logger.scalars(1, {"loss": 1.0})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log.os, "fsync", full)
        with pytest.raises(ResourceError, match=r"disk full: writing log\.jsonl"):
            logger.sync()
    logger.close()
    assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_settings_and_last_figures_for_the_tab_hparams(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    logger = Logger(tmp_path)
    logger.scalars(7, {"loss": 1.0})
    logger.hparams({"lr": 0.1, "sizes": [1, 2], "on": True, "name": None}, {"final/x": 0.5})
    logger.close()
    assert _scalars(tmp_path)["final/x"] == [(7, 0.5)] and len(_lines(tmp_path)) == 1
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert shown["lr"].number_value == 0.1 and shown["on"].string_value == "True"
    assert shown["sizes"].string_value == "[1, 2]" and shown["name"].string_value == "None"

"""Mirrors of the log: all of it arrives once, also over a resume; no store can hold a run up."""

from __future__ import annotations

import json
import re
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynmoe.errors import Interrupted, UserError
from dynmoe.lab import mirrors
from dynmoe.lab.config import RunConfig
from dynmoe.lab.mirrors import check_mirrors, numbers
from dynmoe.lab.run import Run
from dynmoe.lab.stores import STORES, Store


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    lr: float = 0.1


class Memory(Store):
    """Keeps what it is sent."""

    package = "json"
    sent: list[Any]

    def open(self, known: str | None, folder: Path, name: str, settings: dict[str, Any]) -> str:
        self.sent.append(("open", known, name, settings["lr"]))
        return "it"

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        self.sent += lines

    def close(self, final: dict[str, float] | None) -> None:
        self.sent.append(("close", final))


class Broken(Memory):
    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        raise ConnectionError("no route\nto host")


class Hanging(Memory):
    def open(self, known: str | None, folder: Path, name: str, settings: dict[str, Any]) -> str:
        time.sleep(60)
        return "never"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Store]], list[Any]]:
    """Put a store in the place of wandb's; gives the list of what it will be sent."""

    def replace(store: type[Store]) -> list[Any]:
        monkeypatch.setitem(STORES, "wandb", store)
        monkeypatch.setattr(store, "sent", [], raising=False)
        return store.sent  # type: ignore[attr-defined]

    return replace


def work(config: Config, steps: range, stop_at: int | None = None) -> None:
    """A run that logs a line each step and one growth."""
    with Run("cl", "x", config) as run:
        for step in steps:
            run.log.scalars(step, {"loss": 1 / step})
            if step == 2:
                run.log.event(step, "growth", {"experts": 4, "sizes": {"a": [1]}})
            if step == stop_at:
                run.checkpoint(step, {"step": step})
                run.log.scalars(step + 1, {"loss": 0.0})  # behind the checkpoint: cut off
                raise Interrupted("stopped", 15)
        run.finish({"method": "x", "accuracy": 0.5, "of": {"a": 1}, "rows": [1]})


EVENT = (2, {"event/growth/experts": 4.0})
FINAL = {"final/accuracy": 0.5, "final/of.a": 1.0}


def test_what_is_copied_of_a_line() -> None:
    assert numbers({"step": 3, "a/b": 1, "nan": None, "ok": True}) == (3, {"a/b": 1, "ok": 1})
    line = {"step": 2, "event": "growth", "experts": 4, "sizes": {}, "name": "x"}
    assert numbers(line) == EVENT


def test_all_lines_arrive_once_in_order_and_over_a_resume(tmp_path: Path, use: Any) -> None:
    sent = use(Memory)
    config = Config(runs_dir=tmp_path, name="x", mirror=("wandb",), resume=True)
    with pytest.raises(Interrupted):
        work(config, range(1, 6), stop_at=3)
    assert sent[0] == ("open", None, "x/seed-0", 0.1) and sent[-1] == ("close", None)
    assert sent[1:-1] == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), EVENT,
                          (3, {"loss": 1 / 3}), (4, {"loss": 0.0})]  # fmt: skip
    sent.clear()
    work(config, range(4, 7))  # the line behind the checkpoint counts as sent
    assert sent == [("open", "it", "x/seed-0", 0.1), (5, {"loss": 0.2}), (6, {"loss": 1 / 6}),
                    ("close", FINAL)]  # fmt: skip
    kept = json.loads((tmp_path / "cl" / "x" / "seed-0" / "mirror-wandb.json").read_text())
    assert kept == {"run": "it", "lines": 7}


@pytest.mark.parametrize(
    ("store", "said"), [(Broken, r"\(ConnectionError: no route\)"), (Hanging, "within 0 s")]
)
def test_a_store_that_fails_is_one_line_of_warning(
    store: type[Store], said: str, tmp_path: Path, use: Any, monkeypatch: Any, capsys: Any
) -> None:
    use(store)
    monkeypatch.setattr(mirrors, "PATIENCE_S", 0.2)
    began = time.monotonic()
    work(Config(runs_dir=tmp_path, name="x", mirror=("wandb",)), range(1, 4))
    assert time.monotonic() - began < 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: mirror wandb of ")
    assert re.search(said, err)
    bare = Config(runs_dir=tmp_path, name="bare")
    work(bare, range(1, 4))
    logs = [(tmp_path / "cl" / n / "seed-0" / "log.jsonl").read_bytes() for n in ("x", "bare")]
    assert logs[0] == logs[1]


def test_mirrors_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    check_mirrors(())
    with pytest.raises(UserError, match="unknown mirror 'wandbb'.*'wandb'"):
        check_mirrors(("wandbb",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--mirror wandb needs wandb, .*'dynmoe\[wandb\]'$"):
        check_mirrors(("wandb",))
    monkeypatch.setattr(Memory, "package", "json")
    monkeypatch.setitem(STORES, "wandb", Memory)
    with pytest.raises(UserError, match="names wandb twice"):
        check_mirrors(("wandb", "wandb"))


def wandb_records(path: Path) -> list[Any]:
    """The records of a file of wandb's, in LevelDB's log format: blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def test_tensorboard_gets_all_by_its_own_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    work(Config(runs_dir=tmp_path, name="x", mirror=("tensorboard",)), range(1, 4))
    events = EventAccumulator(str(tmp_path / "cl" / "x" / "seed-0" / "everything"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "event/growth/experts"]
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(mirrors, "PATIENCE_S", 250)
    config = Config(runs_dir=tmp_path, name="x", mirror=("wandb",), resume=True)
    with pytest.raises(Interrupted):
        work(config, range(1, 6), stop_at=3)
    work(config, range(4, 7))
    assert capsys.readouterr().err == ""
    files = sorted((tmp_path / "cl" / "x" / "seed-0" / "wandb").glob("offline-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name  # one run of wandb's
    records = [record for file in files for record in wandb_records(file)]
    history = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
               for r in records if r.HasField("history")]  # fmt: skip
    assert [(row["_step"], row["loss"]) for row in history if "loss" in row] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.0), (5, 0.2), (6, 1 / 6),
    ]  # fmt: skip
    assert [row["event/growth/experts"] for row in history if len(row) and row["_step"] == 2] == [4]
    exits = [r.exit.exit_code for r in records if r.HasField("exit")]
    assert exits == [1, 0]


@pytest.mark.slow
def test_mlflow_itself_in_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(mirrors, "PATIENCE_S", 250)
    config = Config(runs_dir=tmp_path, name="x", mirror=("mlflow",), resume=True)
    with pytest.raises(Interrupted):
        work(config, range(1, 6), stop_at=3)
    client = mlflow.MlflowClient()
    place = client.get_experiment_by_name("dynmoe").experiment_id
    assert [run.info.status for run in client.search_runs([place])] == ["KILLED"]
    work(config, range(4, 7))
    assert "warning: mirror" not in capsys.readouterr().err
    [run] = client.search_runs([place])
    loss = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in loss] == [1, 2, 3, 4, 5, 6]
    assert [m.value for m in loss] == pytest.approx([1.0, 0.5, 1 / 3, 0.0, 0.2, 1 / 6])
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.1"
    assert run.data.metrics["final/of.a"] == 1 and run.data.metrics["event/growth/experts"] == 4

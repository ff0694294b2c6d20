"""The study `untold`: its streams, who is told what, and settings chosen on one stream for all."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from cl_benchmarks.settings import check_without_tasks
from dynmoe import cl
from dynmoe.errors import UserError
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import Results
from dynmoe.lab.runner import plan
from dynmoe.lab.study import Preset, Study, judge, without
from dynmoe.studies.untold import CHOICES, SENSORS, Untold
from dynmoe.study import Config, carry_out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _sensors(folder: Path, *names: str) -> None:
    for name in names:
        for file in SENSORS[name]:
            path = folder / "data" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("1,2\n")


def test_streams_are_of_the_data_that_are_there(folder: Path) -> None:
    found = Untold().streams("laptop")
    assert list(found) == ["blurred", "unknown"] and "--dataset fractal" in found["unknown"]
    _sensors(folder, "weather", "elec2")
    (folder / "data" / "tiny-imagenet-200" / "train").mkdir(parents=True)
    found = Untold().streams("laptop")
    assert list(found) == ["blurred", "unknown", "weather", "elec2"]
    assert "--dataset tiny-imagenet" in found["blurred"]


def test_sensor_streams_run_what_needs_no_boundaries(folder: Path) -> None:
    _sensors(folder, *SENSORS)
    study = Untold()
    streams = study.streams("laptop")
    variants = study.variants_on("outdoor", "laptop")
    assert {"fresh", "told"} == set(study.variants("laptop")) - set(variants)
    assert study.variants_on("blurred", "laptop") == study.variants("laptop")
    for name in ("moe-static", "parseval", "plateau", "rank"):  # flags of all: in test_study
        own = variants[name]
        argv = [*shlex.split(own), *shlex.split(streams["outdoor"]), "--allow-unused"]
        _, config = parse(cl.presets(), argv, "study", "")
        check_without_tasks(config)
        config.protocol.build(), config.trigger.build()


def test_the_comparisons_of_a_preset_are_none_of_the_studys(tmp_path: Path) -> None:
    """Preset `online` compares with dense, which is here the main run itself."""
    argv = shlex.split("--preset online --method dense --dataset.file rows.csv")
    (job,) = plan(cl.experiment(), cl.presets(), argv, [3], tmp_path, "x")
    assert job.config.seed == 3 and job.config.compare == ()  # type: ignore[attr-defined]


def test_a_part_that_the_user_names_replaces_the_studys_with_its_options() -> None:
    own = shlex.split("--dataset tiny --dataset.per-class 5 --epochs 3 --dataset.size 8 --chunks 2")
    assert without(own, ["--dataset", "fractal"]) == ["--epochs", "3", "--chunks", "2"]
    assert without(own, ["--dataset.size", "16"]) == own
    several = shlex.split("--method.sizes 1 2 3 --lr 1")
    assert without(several, ["--method", "x"]) == ["--lr", "1"]


def _run(accuracy: float, dataset: str, growths: int) -> dict[str, Any]:
    return {"tasks": [{"online_accuracy": accuracy}] * 2, "dataset": dataset,
            "growth": [{}] * growths}  # fmt: skip


def test_the_verdict_tells_data_growths_and_only_what_was_run() -> None:
    names = ("dense", "told", *CHOICES)
    images = {v: [_run(0.5 + 0.01 * n + s / 50, "photos", n) for s in range(3)]
              for n, v in enumerate(names)}  # fmt: skip
    sensor = {v: [_run(0.6, "rows", 0)] * 3 for v in names if v != "told"}
    runs = {"blurred": images, "outdoor": sensor}
    sentences, comparisons = judge(Untold(), Results(runs, {}, cl.experiment()))
    assert len(sentences) == 19 and comparisons == 18  # also those of outdoor, which are all alike
    assert sentences[0].startswith("blurred: drift against dense: +2.0 points")
    assert sentences[0].endswith("It grew 2.0 times per run.")
    assert sum("against told" in s for s in sentences) == 6
    assert "blurred on photos; outdoor on rows." in sentences[-1]
    assert "weather, elec2" in sentences[-1] and "as they had been before" in sentences[-1]


class Two(Study):
    """Is what is chosen on one stream used on the other?"""

    name = "two-streams-test"  # not registered: other tests read the registry
    searched_on = "shuffle"
    search_seeds = 2
    search_metric = "online_accuracy"

    def streams(self, preset: Preset) -> dict[str, str]:
        short = "--dataset digits --chunks 2 --epochs 2 --network mlp --protocol"
        return {"class": f"{short} class", "shuffle": f"{short} shuffle --protocol.images 100"}

    def variants(self, preset: Preset) -> dict[str, str]:
        return {"dense": "--method dense", "searched": "--method dense --lr 0"}

    def variants_on(self, stream: str, preset: Preset) -> dict[str, str]:
        return self.variants(preset) | ({"wide": "--method wide"} if stream == "shuffle" else {})

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        return {"searched": ["--method dense --lr 1e-9", "--method dense --lr 0.01"]}

    def verdict(self, results: Results) -> list[str]:
        return [results.says(s, "searched", "dense") for s in results.streams]


def test_an_unknown_stream_is_refused(tmp_path: Path) -> None:
    config = Config(study="x", seeds=1, runs_dir=tmp_path, jobs=1, streams=("shufle",))
    with pytest.raises(UserError, match="no stream 'shufle' here; it has class, shuffle"):
        carry_out(Two(), config, [])


@pytest.mark.slow
def test_what_is_chosen_on_one_stream_is_used_on_all(tmp_path: Path) -> None:
    config = Config(study="two-streams-test", seeds=1, runs_dir=tmp_path, jobs=1)
    carry_out(Two(), config, ["--threads", "1"])
    found = json.loads(
        (tmp_path / "study" / "two-streams-test-laptop" / "results.json").read_text()
    )
    assert {s: list(v) for s, v in found["streams"].items()} == {
        "class": ["dense", "searched"], "shuffle": ["dense", "searched", "wide"],
    }  # fmt: skip
    flags = {s: v["searched"]["flags"] for s, v in found["streams"].items()}
    assert flags["class"] == flags["shuffle"] and "--lr 0.01" in flags["class"]

    alone = Config(study="x", seeds=1, runs_dir=tmp_path, jobs=1, streams=("class",),
                   out=tmp_path / "alone")  # fmt: skip
    carry_out(Two(), alone, ["--threads", "1"])
    found = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert list(found["streams"]) == ["class"] and "--streams class" in found["command"]
    assert found["streams"]["class"]["searched"]["flags"] == "--method dense --lr 0"

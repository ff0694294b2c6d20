"""The space of a search, its trials, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")  # the extra "search"

from finished_runs import FLAGS, TINY, finish

from dynmoe import search
from dynmoe.errors import Pruned, UserError
from dynmoe.lab.early_stop import Bar, bar, logged_series
from dynmoe.lab.files import writing
from dynmoe.lab.launchers import Local
from dynmoe.lab.log import Logger
from dynmoe.lab.space import Range, read_space


def test_a_space_is_read() -> None:
    assert read_space(("lr: 1e-4 1e-2 log", "granularity: 1 8 uniform", "router: a b")) == {
        "lr": Range(1e-4, 1e-2, log=True, whole=False),
        "granularity": Range(1, 8, log=False, whole=True),
        "router": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ((), "the search space is empty"),
        (("lr",), "--space 'lr' must read"),
        (("lr:",), "--space 'lr:' must read"),
        (("lr: 0 1 log",), "has no such range; use 0 < low < high"),
        (("lr: 2 1 uniform",), "has no such range; use low < high"),
        (("lr: 1 log",), "needs two numbers before 'log'"),
        (("lr: 1 1",), "has a value twice"),
        (("lr: 1e-3 inf log",), "no such range; use 0 < low < high, both finite"),
        (("lr: -inf 1 uniform",), "no such range; use low < high, both finite"),
        (("lr: 1 'x",), "--space 'lr' cannot be read: no closing quotation in"),
        (("lr: 1 2", "lr: 3 4"), "names 'lr' twice"),
    ],
)
def test_a_space_that_cannot_work(space: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_space(space)


def trials(tmp_path: Path, count: int, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
    """The best flags and all trials of a search whose runs are there already."""
    config = search.Config(
        command="cl", space=("granularity: 1 2 4", "epochs: 3 4"), trials=count, name="s",
        jobs=1, runs_dir=tmp_path, **changes,
    )  # fmt: skip
    own = search.Search(config, FLAGS, read_space(config.space), Local(1))
    for granularity in (1, 2, 4):
        for epochs in (3, 4):
            (job,) = own.plan({"granularity": granularity, "epochs": epochs}, "x")
            finish(job, {1: 0.3, 2: 0.9, 4: 0.5}[granularity] + epochs / 100)
    out = tmp_path / "search" / "s"
    with writing(out):
        best = search.run_trials(own, search.open_study(own, out), out, "command")
    return best, json.loads((out / "search.json").read_text())["trials"]


def test_a_search_finds_the_best_and_goes_on_where_it_was(tmp_path: Path) -> None:
    best, found = trials(tmp_path / "at once", 8)
    assert best == "--granularity 2 --epochs 3" and len(found) == 8
    assert max(t["value"] for t in found) == pytest.approx(0.93)
    trials(tmp_path / "stopped", 3)
    study = search.open_study(
        search.Search(search.Config(command="cl", space=("granularity: 1 2 4", "epochs: 3 4")),
                      FLAGS, {}, Local(1)), tmp_path / "stopped" / "search" / "s",
    )  # fmt: skip
    assert len(study.trials) == 3
    again, later = trials(tmp_path / "stopped", 8)
    assert (again, later) == (best, found)
    with pytest.raises(UserError, match="holds another search"):
        trials(tmp_path / "stopped", 8, minimize=True, at="mean")


def test_a_name_may_have_signs_that_urls_read_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "what?x %41#"
    own = search.Search(search.Config(), FLAGS, {}, Local(1))
    with writing(out):
        search.open_study(own, out)
    assert (out / "search.db").is_file() and [path.name for path in tmp_path.glob("w*")] == [
        out.name
    ]


def test_a_metric_that_runs_lack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no number for --metric nothing --at last"):
        trials(tmp_path, 1, metric="nothing")


def test_the_report_has_other_seeds_than_the_trials(tmp_path: Path) -> None:
    argv = ["cl", "--space", "granularity: 1 2", "--seeds", "999..1000", "--runs-dir"]
    with pytest.raises(UserError, match="has seeds of the trials"):
        search.main([*argv, str(tmp_path)])


def test_a_run_below_the_median_of_earlier_ones_is_stopped(tmp_path: Path) -> None:
    earlier = [{10: float(n), 20: 0.5} | ({30: 0.0} if n else {}) for n in range(5)]
    assert bar("a", earlier[:4], minimize=False) is None
    wanted = bar("a", earlier, minimize=False)
    assert wanted == Bar("a", {10: 2.0, 20: 0.5})  # not all have logged at step 30
    logger = Logger(tmp_path)
    logger.bar = wanted
    logger.scalars(10, {"a": 2.0, "b": 0.0})
    logger.scalars(15, {"a": 0.0})
    logger.scalars(20, {"b": 0.0})
    with pytest.raises(Pruned, match="^stopped at step 20: a 0.4, the median 0.5$"):
        logger.scalars(20, {"a": 0.4})
    with pytest.raises(Pruned, match="a 3, the median 2"):
        Bar("a", {10: 2.0}, minimize=True).check(10, {"a": 3.0})
    logger.event(25, "growth", {"a": 1.0})
    logger.close()
    assert logged_series(tmp_path, "a") == {10: 2.0, 15: 0.0, 20: 0.4}
    assert logged_series(tmp_path, "c") == {}


def test_searched_settings_among_the_flags_are_those_without_the_search(tmp_path: Path) -> None:
    space = read_space(("granularity: 1 2", "batch-size: 8"))
    flags = ["--batch_size", "16", *FLAGS, "--granularity=4", "--epochs", "3"]
    before, common = search.apart(space, flags)
    assert (before, common) == ("--batch_size 16 --granularity=4", [*FLAGS, "--epochs", "3"])
    own = search.Search(search.Config(runs_dir=tmp_path), flags, space, Local(1))
    (trial,) = own.plan({"granularity": 2, "batch-size": 8}, "trial")
    best = ["--granularity", "2", "--batch-size", "8", *common]
    module = search.load("cl")
    (job,) = search.plan(module.experiment(), module.presets(), best, [1000], tmp_path, "x")
    assert job.folder == trial.folder and job.config == trial.config


@pytest.mark.slow
def test_a_search_stops_trials_early_and_reports_on_other_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["cl", "--trials", "8", "--jobs", "2", "--seeds", "1", "--name", "s", "--runs-dir",
            str(tmp_path), "--space", "lr: 1e-6 1e-2 log", "granularity: 1 2",
            "--prune", "task/train_accuracy"]  # fmt: skip
    search.main([*argv, "--", *TINY, "--lr", "1e-7"])
    folder = tmp_path / "search" / "s"
    trials = json.loads((folder / "search.json").read_text())
    states = [trial["state"] for trial in trials["trials"]]
    assert states[:6] == ["complete"] * 6 and "pruned" in states[6:]
    assert all(("stopped at" in t["message"]) == (t["value"] is None) for t in trials["trials"])
    best = max(trials["trials"], key=lambda trial: trial["value"] or 0)
    results = json.loads((folder / "results.json").read_text())["streams"][""]
    assert trials["best"] == best["flags"] == results["best trial"]["flags"]
    assert results["without the search"]["flags"] == "--lr 1e-7"
    assert results["without the search"]["runs"] != results["best trial"]["runs"]
    seeds = [path.parent.name for path in tmp_path.rglob("summary.json")]
    assert set(seeds) == {"seed-1000", "seed-0"} and seeds.count("seed-0") == 2
    assert "best trial against without the search" in capsys.readouterr().out

"""The space of a search, its trials, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")  # the extra "search"

from finished_runs import FLAGS, TINY, finish

from dynmoe import search
from dynmoe.errors import UserError
from dynmoe.lab.files import writing
from dynmoe.lab.launchers import Local
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
    assert best == "--granularity 2 --epochs 4" and len(found) == 8
    assert max(t["value"] for t in found) == pytest.approx(0.94)
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


def test_a_metric_that_runs_lack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no number for --metric nothing --at last"):
        trials(tmp_path, 1, metric="nothing")


def test_the_report_has_other_seeds_than_the_trials(tmp_path: Path) -> None:
    argv = ["cl", "--space", "granularity: 1 2", "--seeds", "999..1000", "--runs-dir"]
    with pytest.raises(UserError, match="has seeds of the trials"):
        search.main([*argv, str(tmp_path)])


@pytest.mark.slow
def test_a_search_reports_on_other_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["cl", "--trials", "3", "--jobs", "2", "--seeds", "1", "--name", "s", "--runs-dir",
            str(tmp_path), "--space", "lr: 1e-4 1e-2 log", "granularity: 1 2"]  # fmt: skip
    search.main([*argv, "--", *TINY])
    folder = tmp_path / "search" / "s"
    trials = json.loads((folder / "search.json").read_text())
    best = max(trials["trials"], key=lambda trial: trial["value"])
    results = json.loads((folder / "results.json").read_text())["streams"][""]
    assert trials["best"] == best["flags"] == results["best trial"]["flags"]
    seeds = [path.parent.name for path in tmp_path.rglob("summary.json")]
    assert set(seeds) == {"seed-1000", "seed-0"} and seeds.count("seed-0") == 2
    assert "best trial against without the search" in capsys.readouterr().out

"""The newest experts' share of the gates at task ends, and lock-out."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_benchmarks.board import BOARD
from cl_benchmarks.experiment import ContinualLearning, _print_tasks
from cl_benchmarks.images import ImageData
from cl_benchmarks.lock_out import (
    LOCK_OUT,
    lock_out_scalars,
    locked_out,
    newest_shares,
    tasks_with_lock_out,
    warn_of_lock_out,
)
from cl_benchmarks.recorder import TaskRow
from dynmoe import cl
from dynmoe.growth.new_experts import NewExperts
from dynmoe.lab.experiment import Results, logged
from dynmoe.lab.runner import Done, run_one
from dynmoe.moe import MoELayer
from dynmoe.registry import get


def grown(*created: int) -> MoELayer:
    """A layer whose experts were made at these growths."""
    layer = MoELayer(4, 4, 12, num_experts=len(created), max_experts=6)
    layer.created[: len(created)] = torch.tensor(created)
    return layer


def test_shares_are_means_over_samples_layers_and_old_tasks() -> None:
    model = nn.Sequential(grown(0, 0, 1, 1), nn.ReLU(), grown(0, 0, 1))
    first = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.0, 0.6]])  # 0.2 and 0.6 are new
    second = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 2.0]])  # as shares 0 and 0.5
    none, all_new = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0.0, 0, 1]])
    gates = {
        0: {"0": none, "2": all_new},
        3: {"0": none, "2": second},
        5: {"0": first, "2": second},
    }
    found = newest_shares(model, gates)
    assert found["newest_share"] == pytest.approx((0.4 + 0.25) / 2)
    assert found["newest_share_old"] == pytest.approx(((0 + 1) / 2 + (0 + 0.25) / 2) / 2)
    assert found["newest_even"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert newest_shares(model, {5: gates[5]})["newest_share_old"] is None


def test_only_the_latest_growth_counts_and_layers_without_one_do_not() -> None:
    model = nn.Sequential(grown(0, 1, 2), grown(0, 0, 0))
    gates = {0: {"0": torch.tensor([[0.5, 0.3, 0.2]]), "1": torch.tensor([[0.0, 0.0, 1.0]])}}
    found = newest_shares(model, gates)
    assert found["newest_share"] == pytest.approx(0.2)
    assert found["newest_even"] == pytest.approx(1 / 3)


def test_nothing_is_known_without_a_growth_or_gates() -> None:
    assert newest_shares(nn.Sequential(grown(0, 0)), {0: {"0": torch.ones(3, 2)}}) == {}
    assert newest_shares(nn.Linear(2, 2), {0: {}}) == {}
    assert newest_shares(nn.Sequential(grown(0, 1)), {}) == {}


def row(share: float | None, old: float | None = None, even: float | None = 0.4) -> dict[str, Any]:
    return asdict(TaskRow(0.5, 0.5, 0.5, 4, 10, 3, newest_share=share, newest_share_old=old,
                          newest_even=None if share is None else even))  # fmt: skip


def test_lock_out_is_a_share_below_a_quarter_of_an_even_one() -> None:
    assert LOCK_OUT == 0.25
    assert locked_out(row(0.0999)) and not locked_out(row(0.1001))
    assert not locked_out(row(None)) and not locked_out({})  # of summaries before there was one
    assert tasks_with_lock_out([row(None), row(0.01), row(0.5), row(0.09)]) == [2, 4]
    assert lock_out_scalars(row(None)) == {}
    assert lock_out_scalars(row(0.3)) == {"router/newest_share_now": 0.3, "router/lock_out": 0.0}
    assert lock_out_scalars(row(0.02, 0.1)) == {
        "router/newest_share_now": 0.02, "router/newest_share_old": 0.1, "router/lock_out": 1.0,
    }  # fmt: skip


def test_the_warning_names_tasks_and_flags_that_are_not_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(rows: list[dict[str, Any]], **settings: Any) -> str:
        warn_of_lock_out(rows, replace(cl.presets()["plain"], **settings), "dynamicmoe")
        return capsys.readouterr().err

    rows = [row(None), row(0.01), row(0.5), row(0.09)]
    assert told(rows[:1]) == told([row(0.5)]) == ""
    line = told(rows)
    assert (
        line.count("\n") == 1 and "warning: dynamicmoe: lock-out at the end of tasks 2, 4:" in line
    )
    assert line.endswith("; try --router gaussian or --init.router all\n")
    gaussian = get("router", "gaussian").Config()
    every_row = get("init", "random").Config(router="all")
    assert told(rows, router=gaussian).endswith("of the samples\n")
    assert told(rows, router=gaussian, init=every_row).endswith("; try --init.router new\n")
    assert told(rows, init=every_row).endswith("; try --router gaussian --init.router new\n")
    other = get("init", "duplicate").Config()  # has no such option
    assert told(rows, init=other).endswith("; try --router gaussian\n")


def test_tables_and_studies_have_the_shares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # so that tables have one line a row
    tasks = [row(None), row(0.5, 0.3), row(0.05, 0.1)]
    _print_tasks({"tasks": tasks}, "t")
    shown = capsys.readouterr().out
    assert "newest experts, now / old" in shown and "50.0 % / 30.0 %" in shown
    assert "5.0 % / 10.0 % (locked out)" in shown
    _print_tasks({"tasks": [row(None), row(None)]}, "t")
    assert "newest" not in capsys.readouterr().out
    runs = {"s": {"grow": [{"tasks": tasks}], "dense": [{"tasks": [row(None)] * 3}]}}
    results = Results(runs, {}, ContinualLearning())
    assert results.values("s", "grow", "newest_share", "last") == [0.05]
    assert results.values("s", "grow", "newest_share_old", "mean") == [pytest.approx(0.2)]
    assert all(map(math.isnan, results.values("s", "dense", "newest_share", "last")))


# ---------------------------------------------------------------- in runs


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def run(runs: Path, data: ImageData, router: str, **settings: Any) -> Done:
    """3 tasks in the plain form, new experts at first far below the others where rows decide."""
    config = replace(
        cl.presets()["plain"],
        runs_dir=runs,
        compare=(),
        chunks=3,
        epochs=2,
        lr=0.01,
        eval_samples=20,
        probe_samples=40,
        old_samples=20,
        name=f"{router}-run",
        router=get("router", router).Config(),
        protocol=get("protocol", "permuted").Config(images=200),
        network=get("network", "mlp").Config(width=16, hidden=24),
        new_experts=NewExperts(logit=-6.0, logit_steps=10_000),
        **settings,
    )
    return run_one(ContinualLearning(), "x", config, data)


def test_a_softmax_router_with_new_rows_alone_locks_out_and_says_so(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, digits, "softmax")
    rows = done.summary["tasks"]
    assert done.summary["lock_out"] == [2, 3]
    assert [r["newest_even"] for r in rows] == [None, 0.5, pytest.approx(1 / 3)]
    assert rows[0]["newest_share"] is None and max(r["newest_share"] for r in rows[1:]) < 0.05
    out, err = capsys.readouterr()
    assert err.count("lock-out at the end of tasks 2, 3") == 1 and "(locked out)" in out
    tags = {tag: logged(done.folder, f"router/{tag}") for tag in (
        "newest_share_now", "newest_share_old", "lock_out")}  # fmt: skip
    assert tags["newest_share_now"] == [r["newest_share"] for r in rows[1:]]
    assert tags["newest_share_old"] == [r["newest_share_old"] for r in rows[1:]]
    assert tags["lock_out"] == [1.0, 1.0]
    assert not logged(done.folder, "task/newest_share")  # has its tag with the router's
    assert all(BOARD.name(f"router/{tag}") for tag in tags)


def test_the_gaussian_router_does_not(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, digits, "gaussian")
    assert done.summary["lock_out"] == [] and "lock-out" not in capsys.readouterr().err
    assert min(r["newest_share"] for r in done.summary["tasks"][1:]) > 0.3
    assert logged(done.folder, "router/lock_out") == [0.0, 0.0]


def test_of_dense_networks_and_tasks_without_measurements_nothing_is_told(
    digits: ImageData, tmp_path: Path
) -> None:
    dense = run(tmp_path, digits, "softmax", method=get("method", "dense").Config())
    assert dense.summary["lock_out"] == []
    assert {r["newest_share"] for r in dense.summary["tasks"]} == {None}
    seldom = run(tmp_path / "2", digits, "softmax", measure_every=2)
    assert [r["newest_share"] is None for r in seldom.summary["tasks"]] == [True, True, False]
    assert seldom.summary["lock_out"] == [3]

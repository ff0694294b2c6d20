"""Two processes that share a run end where one does with the whole batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import shared_play
import shared_runs
import torch
from together import LOGGED, close, found, log, spawn, together_and_alone

from dynmoe import commands
from dynmoe.errors import UserError
from dynmoe.lab import processes
from dynmoe.lab.report import run_all
from dynmoe.rl import presets

sys.path.append(str(Path(__file__).parents[1] / "dg"))  # of dg_learning, here and in processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the commands; most of the time goes into imports."""
    return spawn(
        tmp_path_factory.mktemp("runs"), shared_runs.trains_cl, shared_runs.resumes_cl,
        shared_runs.refuses_cl, shared_runs.trains_dg, shared_runs.resumes_dg,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_is_that_of_one_process(runs, tmp_path):
    first, alone = together_and_alone(runs, shared_runs.trains_cl, tmp_path)
    assert close(first["weights"], alone["weights"])
    assert close(first["summary"], alone["summary"])
    own = "runs-0/cl/whole/seed-0"
    assert close(log(runs / own), log(tmp_path / own), LOGGED)


@pytest.mark.slow
def test_networks_of_domains_are_those_of_one_process(runs, tmp_path):
    (first,), alone = found(runs, shared_runs.trains_dg, [0]), shared_runs.trains_dg(tmp_path)
    assert [len(row["growth"]) for row in alone["summary"]["tests"]] == [1, 1]
    assert close(first, alone) and None not in alone["weights"]
    own = "runs-0/dg/whole/seed-0"
    assert close(log(runs / own), log(tmp_path / own), LOGGED)


@pytest.mark.slow
def test_domains_resume_exactly_after_one_signal(runs):
    (whole,) = found(runs, shared_runs.trains_dg, [0])
    first, second = found(runs, shared_runs.resumes_dg)
    assert first["stopped"] == second["stopped"] == "stopped by SIGTERM at step 7"
    assert first["summary"] == second["summary"] == whole["summary"]
    for one, two in zip(first["weights"], whole["weights"], strict=True):
        assert all(torch.equal(two[name], value) for name, value in one.items())
    logs = [runs / "runs-0/dg" / name / "seed-0" for name in ("whole", "stopped")]
    assert log(logs[0]) == log(logs[1])


@pytest.mark.slow
def test_one_signal_stops_all_and_resuming_is_exact(runs):
    whole = found(runs, shared_runs.trains_cl)[0]
    for resumed in found(runs, shared_runs.resumes_cl):
        assert resumed["stopped"] == "stopped by SIGTERM at step 13"
        assert all(torch.equal(whole["weights"][n], w) for n, w in resumed["weights"].items())
        assert resumed["summary"] == whole["summary"]
    logs = [runs / "runs-0/cl" / name / "seed-0" for name in ("whole", "stopped")]
    assert log(logs[0]) == log(logs[1])


@pytest.mark.slow
def test_only_the_first_writes(runs):
    assert (runs / "runs-0/cl/whole/seed-0/summary.json").is_file()
    assert not (runs / "runs-1").exists()


@pytest.mark.slow
def test_what_needs_whole_batches_is_refused_by_all(runs):
    first, second = found(runs, shared_runs.refuses_cl)
    assert first == second
    for reason, words in zip(
        first, ("--router expert-choice", "--intervention redo", "--batch-size 1"), strict=True
    ):
        assert words in reason and "2 processes" in reason


def test_two_processes_learn_from_the_whole_batch_and_know_a_lost_one(tmp_path):
    """BatchNorm, methods of dg that look at a batch as a whole, and a rollout of rl."""
    checks = (
        shared_runs.learns_dg, shared_runs.shares_batch_norm, shared_play.shares_a_rollout
    )  # fmt: skip
    folder = spawn(tmp_path, *checks, shared_runs.loses_one)
    for check in checks:
        alone = check(tmp_path)
        for shared in found(folder, check):
            assert close(shared, alone)
    assert found(folder, shared_runs.loses_one, ranks=(0,)) == [True]


def test_a_batch_of_domains_that_cannot_be_shared_evenly(monkeypatch):
    from dynmoe.dg.__main__ import presets
    from dynmoe.experiments.dg.batch import check_shared

    config = replace(presets()["smoke"], batch_size=6)
    check_shared(config)
    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(UserError, match="--batch-size 6; use a multiple of 4, twice their number"):
        check_shared(config)


@pytest.fixture
def by_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")


def test_torchrun_where_it_makes_no_sense(by_torchrun, tmp_path):
    from agents.experiment import ReinforcementLearning

    config = replace(presets()["smoke"], runs_dir=tmp_path / "runs", jobs=2)
    with pytest.raises(UserError, match="--jobs 2"):
        run_all(ReinforcementLearning(), "smoke", config)
    with pytest.raises(UserError, match=r"not for sweep; start it as: python -m dynmoe\.sweep"):
        commands._check_start("sweep")
    with pytest.raises(UserError, match=r"--device cuda:0 .*use --device cuda"):
        processes.join("cuda:0")
    if torch.cuda.device_count() < 2:
        with pytest.raises(UserError, match="2 processes here, and there are"):
            processes.join("cuda")
    assert not config.runs_dir.exists()

"""Two processes that share a run of rl, each with half of the environments, end where one does."""

from __future__ import annotations

import re
import shutil

import pytest
import shared_play
import torch
from together import LOGGED, close, found, log, spawn, together_and_alone

from dynmoe.lab import checkpoint

LATEST_PASS = re.compile(r"router/(entropy|balance|load_max|load_min|newest_share|dead_experts)/")
"""What an agent's log tells of the latest pass, of which a process has its own rows."""


def of_the_whole(folder):
    """Lines of a log without what is of a process's own rows."""
    return [{k: v for k, v in line.items() if not LATEST_PASS.match(k)} for line in log(folder)]


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """Runs of two processes; one of them goes on from what one process has begun."""
    folder = tmp_path_factory.mktemp("plays")
    assert shared_play.leaves(folder / "one") == "stopped by SIGTERM at step 2"
    return spawn(
        folder, shared_play.plays_stages, shared_play.plays_codes, shared_play.plays_symbolic,
        shared_play.goes_on, shared_play.leaves, shared_play.takes_over_from_one,
        shared_play.acts_at_random, shared_play.divides, shared_play.fails_on_one,
    )  # fmt: skip


def same_run(plays, check, name, tmp_path):
    """The whole run, its checkpoint and its log are those of one process, which is returned."""
    first, alone = together_and_alone(plays, check, tmp_path)
    assert alone.pop("played") == 2 * first.pop("played")
    assert close(first, alone)
    own = f"runs-0/rl/{name}/seed-0"
    assert close(of_the_whole(plays / own), of_the_whole(tmp_path / own), LOGGED)
    assert not (plays / "runs-1").exists()
    return alone


@pytest.mark.slow
def test_on_floors(plays, tmp_path):
    """With returns on phases, evaluations and the best agent, which are of all environments."""
    alone = same_run(plays, shared_play.plays_stages, "stages", tmp_path)
    assert len(alone["summary"]["evaluations"]) == 2 and alone["summary"]["best_evaluation"]
    assert len(alone["summary"]["shifts"]) > 1 and alone["summary"]["phase_returns"]
    best = "runs-0/rl/stages/seed-0/best"
    states = [checkpoint.load_latest(at / best)["state"] for at in (plays, tmp_path)]
    assert close(*states) and len(states[0]["env"]["floor"]) == 6


@pytest.mark.slow
def test_on_frames_of_craftax(plays, tmp_path):
    alone = same_run(plays, shared_play.plays_codes, "codes", tmp_path)
    assert alone["saved"]["env"]["num_envs"] == 4


@pytest.mark.slow
def test_on_vectors_of_craftax(plays, tmp_path):
    same_run(plays, shared_play.plays_symbolic, "symbolic", tmp_path)


@pytest.mark.slow
def test_as_many_processes_go_on_exactly(plays):
    (whole,) = found(plays, shared_play.plays_codes, [0])
    for resumed in found(plays, shared_play.goes_on):
        assert resumed["stopped"] == "stopped by SIGTERM at step 3"
        assert all(torch.equal(whole["weights"][n], w) for n, w in resumed["weights"].items())
        assert resumed["summary"] == whole["summary"]
    logs = [log(plays / "runs-0/rl" / name / "seed-0") for name in ("codes", "stopped")]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_another_number_of_processes_goes_on(plays, tmp_path):
    """One from two, and two from one."""
    (whole,) = found(plays, shared_play.plays_codes, [0])
    assert found(plays, shared_play.leaves) == ["stopped by SIGTERM at step 3"] * 2
    shutil.copytree(plays / "runs-0", tmp_path / "runs-0")
    one, two = shared_play.takes_over(tmp_path), found(plays, shared_play.takes_over_from_one)[0]
    assert (one.pop("played"), two.pop("played"), whole.pop("played")) == (4, 2, 2)
    assert close(one, whole) and close(two, whole)


@pytest.mark.slow
def test_what_stops_one_stops_all(plays):
    assert found(plays, shared_play.acts_at_random) == ["stopped by SIGTERM at step 2"] * 2
    first, second = found(plays, shared_play.fails_on_one)
    assert first == second and "outputs are not finite" in first[0] and first[1] != 0
    first, second = found(plays, shared_play.divides)
    assert first == second and "num_envs 5" in first and "such as 6" in first

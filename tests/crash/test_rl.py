"""`python -m dynmoe.rl` ends as if never stopped, however rudely it was; errors are one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from crash_helpers import assert_same, error_line, exit_code, last_checkpoint, stop_at

from agents.recorder import UpdateRecorder
from dynmoe import rl
from dynmoe.lab import checkpoint

ROOT = Path(__file__).parents[2]
SMALL = (
    "--preset smoke --encoder.hidden 16 --encoder.widths 16 --num-envs 4 --rollout-steps 16 "
    "--total-steps 512 --minibatches 2 --epochs 2 --probe-every 3 --probe-samples 32 "
    "--checkpoint-every-s 0"
)
"""8 updates of 64 steps and a checkpoint after each."""
CASES = {
    "stage": "--trigger.share 0",
    "every": "--trigger every --trigger.steps 100 --granularity 2",
    "constant": "--trigger every --trigger.steps 150 --budget.mode constant --pruning utility",
    "plateau": "--trigger plateau --trigger.patience 70 --trigger.limit 2",
    "gradient": "--trigger gradient --trigger.share 0.99 --trigger.memory 1 --trigger.cooldown 64 "
    "--trigger.limit 2 --new-experts.lr 0.5 --new-experts.lr-steps 3 --new-experts.logit -1 "
    "--new-experts.logit-steps 6",
    "drift": "--trigger drift --trigger.warmup 1 --trigger.threshold 1e-6 --trigger.delta 0 "
    "--trigger.cooldown 64 --trigger.limit 2",
    "rank": "--trigger rank --trigger.share 0.9999 --trigger.cooldown 64 --trigger.limit 2 "
    "--probe-every 1",
    "trunk": "--trigger at --trigger.steps 150 --encoder.place trunk actor critic --router topk "
    "--balance switch",
    "dense": "--method dense --env Identity-v0",
    "random": "--method random",
}
CLASSIC = (
    "--preset laptop --env Craftax-Classic-Pixels-v1 --num-envs 4 --rollout-steps 32 --threads 1 "
    "--total-steps 1024 --trigger.steps 400 --minibatches 2 --epochs 1 --probe-every 4 "
    "--probe-samples 32 --encoder.hidden 32 --checkpoint-every-s 0 --name x"
)
"""8 updates on Craftax Classic's pixels, growing once."""


def _argv(runs: Path, extra: str = "") -> list[str]:
    return f"{SMALL} {extra} --name x --allow-unused --runs-dir {runs}".split()


def _folder(runs: Path) -> Path:
    return runs / "rl" / "x" / "seed-0"


def _exit_code(argv: list[str]) -> int:
    return exit_code(rl.main, argv)


def _assert_same_run(one: Path, two: Path) -> None:
    for name in ("log.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("router.png", "learning.png"):
        assert (one / name).is_file() == (two / name).is_file(), name
        if (one / name).is_file():
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    last = [last_checkpoint(folder) for folder in (one, two)]
    assert last[0] is not None and last[0]["state"]["policy"]
    assert_same(last[0], last[1])


@pytest.mark.thin(2)
@pytest.mark.parametrize(("case", "every"), [("every", 1), *((case, 2) for case in CASES)])
def test_stopped_after_updates(
    case: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _exit_code(_argv(tmp_path / "whole", f"{CASES[case]} --checkpoint-every-s 999")) == 0
    stop_at(monkeypatch, UpdateRecorder, "update_done", every)
    sessions = 1
    while (code := _exit_code(_argv(tmp_path / "cut", f"{CASES[case]} --resume"))) != 0:
        assert code == 143
        sessions += 1
    assert sessions == 8 // every + 1
    whole = _folder(tmp_path / "whole")
    _assert_same_run(whole, _folder(tmp_path / "cut"))
    first = json.loads((whole / "log.jsonl").read_text().split("\n")[0])
    assert first["event"] == "memory" and isinstance(first["freed_memory_is_kept"], bool)
    grown = len(json.loads((whole / "summary.json").read_text())["growth"])
    expected = {"every": 4, "constant": 2, "plateau": 2, "gradient": 2, "drift": 2, "rank": 2}
    assert grown == (expected | {"dense": 0, "random": 0}).get(case, 1)


class Global(gymnasium.Env):
    """Draws what it shows from numpy's global generator."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    time = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return np.random.normal(size=2).astype(np.float32).clip(-9, 9), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        seen = np.random.normal(size=2).astype(np.float32).clip(-9, 9)
        return seen, float(seen[0]), self.time == 20, False, {}


def test_an_environment_that_draws_from_the_global_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making and resetting environments anew does not move it."""
    gymnasium.register("Global-v0", Global)
    extra = "--env Global-v0 --encoder mlp --method dense"
    assert _exit_code(_argv(tmp_path / "whole", extra)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, UpdateRecorder, "update_done", 3)
        codes = [_exit_code([*_argv(tmp_path / "stopped", extra), "--resume"]) for _ in range(4)]
    assert codes[0] != 0 and codes[-1] == 0
    del gymnasium.registry["Global-v0"]
    _assert_same_run(_folder(tmp_path / "whole"), _folder(tmp_path / "stopped"))


@pytest.mark.slow
def test_sigterm_to_a_real_process(tmp_path: Path) -> None:
    """It saves, exits with 143 and prints the command that goes on."""
    extra = "--total-steps 8192"
    assert _exit_code(_argv(tmp_path / "whole", extra)) == 0
    command = [sys.executable, "-m", "dynmoe.rl", *_argv(tmp_path / "cut", extra)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    _wait_for(tmp_path / "cut", 3, process)
    process.terminate()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err
    advice = shlex.split(error_line(err).split("go on with: ")[1])
    assert advice == ["python", "-m", "dynmoe.rl", *command[3:], "--resume"]
    assert _exit_code(advice[3:]) == 0
    _assert_same_run(_folder(tmp_path / "whole"), _folder(tmp_path / "cut"))


@pytest.mark.slow
def test_craftax_killed_in_rollouts_and_saves(tmp_path: Path) -> None:
    """SIGKILL at three moments of a run on Craftax's pixels; it ends bit-equal."""
    whole = f"{CLASSIC} --runs-dir {tmp_path / 'whole'}".split()
    cut = f"{CLASSIC} --runs-dir {tmp_path / 'cut'} --resume".split()
    assert _exit_code(whole) == 0
    for updates, delay in ((2, 0.05), (4, 0.15), (6, 0.0)):
        process = subprocess.Popen(
            [sys.executable, "-m", "dynmoe.rl", *cut], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        _wait_for(tmp_path / "cut", updates, process)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert _exit_code(cut) == 0
    _assert_same_run(_folder(tmp_path / "whole"), _folder(tmp_path / "cut"))
    summary = json.loads((_folder(tmp_path / "cut") / "summary.json").read_text())
    assert [event["experts"] for event in summary["growth"]] == [2, 3]


def _wait_for(runs: Path, updates: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of that many updates, or more, is there."""
    folder, began = _folder(runs) / "checkpoints", time.monotonic()
    while not any(int(p.stem[5:]) >= updates for p in folder.glob("*.pt")):
        assert process.poll() is None and time.monotonic() - began < 240
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env Craftax-Pixel-v1", "Did you mean 'Craftax-Pixels-v1'"),
        ("--env no_such_module:Name-v0", "'no_such_module' cannot be imported"),
        ("--env Pendulum-v1 --env-args {g:5}", "--env-args {g:5} is no JSON object"),
        ("--env Pendulum-v1 --env-args [5]", "--env-args [5] is no JSON object"),
        ('--env Pendulum-v1 --env-args {"gravity":5}', "unexpected keyword argument 'gravity'"),
        ('--env Stages-v0 --env-args {"g":5}', "unknown option of Stages-v0 'g'"),
        ("--env Stages-v0 --normalize-rewards", "gymnasium's environments only"),
        ("--minibatches 7", "do not divide into --minibatches 7"),
        ("--total-steps 10", "less than one rollout"),
        ("--num-envs 0", "--num-envs 0 is too small"),
        ("--adam-eps 0", "--adam-eps 0.0 is too small; use a number above 0"),
        ("--encoder.place", "--encoder.place names no block; use trunk, actor or critic"),
        ("--video summary.json", "--video summary.json: the video is an mp4"),
        ("--lr nan", "--lr nan is no finite number"),
        ("--trigger every --trigger.steps 5000", "never fires in"),
        ("--trigger task", "never fires"),
        ("--env Identity-v0", "there are no stages here"),
        ("--granularity 0", "granularity 0 must be at least 1"),
        ("--budget.mode constant --encoder.hidden 1", "budget"),
        ("--probe-every 0", "--probe-every 0 is too small"),
        ("--device cuda:99", "device 'cuda:99' is not there"),
        ("--compare dynamicmoe", "name each method once"),
        ("--evaluate nowhere", "no run of this command there"),
        ("--method dynamicmo", "Did you mean 'dynamicmoe'"),
    ],
)
def test_user_errors(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(_argv(tmp_path, flags)) == 2
    assert message in error_line(capsys.readouterr().err)


def test_an_encoder_for_images_refuses_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"--env Identity-v0 --encoder conv --runs-dir {tmp_path}".split()
    assert _exit_code(argv) == 2
    assert "use --encoder mlp" in error_line(capsys.readouterr().err)


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(_argv(tmp_path, "--lr 1e38 --max-grad-norm 0")) == 3
    assert "a smaller --lr" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_environment_that_gives_what_is_not_finite_stops_the_run(
    what: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the environment, the step and what it is."""
    (tmp_path / "broken_game.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    args = json.dumps({"what": what, "value": value}, separators=(",", ":"))
    argv = _argv(tmp_path, f"--env broken_game:Broken-v0 --method moe-start --env-args {args}")
    assert _exit_code(argv) == 3
    line = error_line(capsys.readouterr().err)
    assert f"environment broken_game:Broken-v0: {what} of number 0 (of 4) is {value}" in line
    assert "at step 20;" in line


BROKEN = """
import gymnasium, numpy as np
class Broken(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (3,))
    action_space = gymnasium.spaces.Discrete(2)
    def __init__(self, what, value): self.what, self.value, self.steps = what, float(value), 0
    def reset(self, *, seed=None, options=None): return np.zeros(3, np.float32), {}
    def step(self, action):
        self.steps += 1
        bad = self.value if self.steps == 20 else 0.0
        seen = np.array([0, bad if self.what == "observation" else 0, 0], np.float32)
        return seen, bad if self.what == "reward" else 1.0, False, self.steps % 7 == 0, {}
gymnasium.register("Broken-v0", Broken)
"""


def test_a_gymnasium_run_keeps_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through checkpoints and into evaluation, which only uses them."""
    scaled = "--env Pendulum-v1 --normalize-observations --normalize-rewards"
    argv = _argv(tmp_path, f"{scaled} --method moe-start --total-steps 1024")
    stop_at(monkeypatch, UpdateRecorder, "update_done", 4)
    assert _exit_code([*argv, "--resume"]) == 143
    folder = _folder(tmp_path) / "checkpoints"
    before = checkpoint.load_latest(folder)
    assert _exit_code([*argv, "--resume"]) in (0, 143)
    after = checkpoint.load_latest(folder)
    assert before is not None and after is not None
    counts = [saved["state"]["env"]["normaliser"]["rewards"]["count"] for saved in (before, after)]
    steps = [saved["state"]["update"] * 64 for saved in (before, after)]
    assert counts == pytest.approx([count + 1e-4 for count in steps])
    monkeypatch.undo()
    assert _exit_code(["--evaluate", str(_folder(tmp_path)), "--max-steps", "300"]) == 0
    found = json.loads(next(_folder(tmp_path).glob("evaluation-*.json")).read_text())
    assert found["episodes"] == 4 and found["return_mean"] < -500  # as given, not as normalised


def test_evaluation_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run, one of its checkpoints, and one that is damaged."""
    assert _exit_code(_argv(tmp_path, "--total-steps 4096")) == 0
    folder = _folder(tmp_path)
    assert _exit_code(["--evaluate", str(folder)]) == 0
    first = json.loads((folder / "evaluation-4096-seed-0.json").read_text())
    assert first["episodes"] == 4
    newest = max((folder / "checkpoints").glob("*.pt"))
    assert _exit_code(["--evaluate", str(newest)]) == 0
    assert json.loads((folder / "evaluation-4096-seed-0.json").read_text()) == first
    assert _exit_code(["--evaluate", str(folder), "--video", str(tmp_path / "x.mp4")]) == 2
    newest.write_bytes(newest.read_bytes()[:-9])
    capsys.readouterr()
    assert _exit_code(["--evaluate", str(newest)]) == 4
    assert "damaged" in error_line(capsys.readouterr().err)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    """Craftax starts with a cache folder where a file is in the way."""
    (tmp_path / "cache").write_text("in the way")
    code = (
        "import envs, torch; env = envs.make('Craftax-Classic-Symbolic-v1', 1);"
        "env.reset(); print(env.step(torch.zeros(1, dtype=torch.long))[1].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=280,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "torch.Size([1])\n", done.stderr
    assert "cannot be written" in done.stderr

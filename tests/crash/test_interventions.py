"""Runs with interventions end as if never stopped, in cl and rl; what cannot work is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import assert_same, error_line, exit_code, last_checkpoint, stop_at

import agents.recorder
import cl_benchmarks.recorder
from dynmoe import cl, rl

CL = (
    "--preset smoke --compare --chunks 3 --epochs 2 --eval-samples 60 --protocol.images 150 "
    "--probe-samples 40 --network.width 24 --network.hidden 48 --checkpoint-every-s 0"
)
RL = (
    "--preset smoke --encoder.hidden 16 --encoder.widths 16 --num-envs 4 --rollout-steps 16 "
    "--total-steps 512 --minibatches 2 --epochs 2 --probe-every 3 --probe-samples 32 "
    "--checkpoint-every-s 0"
)
GROWING = "--trigger every --trigger.steps 4 --budget.mode per-growth"
CL_CASES = {
    "cbp": f"--intervention cbp --intervention.rate 0.05 --intervention.maturity 2 {GROWING}",
    "snr": f"--intervention snr --intervention.limit 2 --intervention.period 2 {GROWING}",
    "injection": f"--intervention injection --intervention.task 1 {GROWING}",
    "injection and optimizer reset": "--method dense --intervention injection "
    "--intervention.step 5 --reset-optimizer --optimizer adamw",
    "hare-tortoise": f"--intervention hare-tortoise --intervention.period 4 {GROWING}",
    "shrink-perturb": "--method dense --intervention shrink-perturb",
    "dash": "--intervention dash --network cnn",
    "crelu": "--method dense --intervention crelu --network cnn",
    "nap": f"--intervention nap {GROWING}",
}
RL_GROWING = "--trigger every --trigger.steps 150 --budget.mode per-growth"
RL_CASES = {
    "redo": f"--intervention redo --intervention.period 3 --intervention.tau 0.5 {RL_GROWING}",
    "cbp": f"--intervention cbp --intervention.rate 0.05 --intervention.maturity 2 {RL_GROWING}",
    "injection": "--method dense --intervention injection --intervention.step 7",
    "l2-init": f"--intervention l2-init {RL_GROWING}",
    "layernorm": "--method dense --intervention layernorm",
}


def _stopped(
    main: Any,
    recorder: Any,
    moment: str,
    every: int,
    flags: str,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
) -> tuple[Path, int]:
    """Left alone, and stopped at every `every`-th moment; checked to be the same."""
    command = "cl" if main is cl.main else "rl"

    def argv(runs: str, extra: str) -> list[str]:
        return f"{flags} {extra} --name x --runs-dir {tmp_path / runs}".split()

    assert exit_code(main, argv("whole", "--checkpoint-every-s 999")) == 0
    stop_at(patch, recorder, moment, every)
    sessions = 1
    while (code := exit_code(main, argv("cut", "--resume"))) != 0:
        assert code == 143
        sessions += 1
    whole, cut = (tmp_path / runs / command / "x" / "seed-0" for runs in ("whole", "cut"))
    for name in ("log.jsonl", "summary.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    last = [last_checkpoint(folder) for folder in (whole, cut)]
    assert last[0] is not None
    assert_same(last[0], last[1])
    return whole, sessions


@pytest.mark.thin(2)
@pytest.mark.parametrize("case", CL_CASES)
def test_learning_of_a_stream(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = f"{CL} {CL_CASES[case]}"
    recorder = cl_benchmarks.recorder.TaskRecorder
    _, sessions = _stopped(cl.main, recorder, "batch_done", 3, flags, tmp_path, monkeypatch)
    assert sessions == 18 // 3 + 1


@pytest.mark.thin(1)
@pytest.mark.parametrize("case", RL_CASES)
def test_reinforcement_learning(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = f"{RL} {RL_CASES[case]}"
    recorder = agents.recorder.UpdateRecorder
    folder, sessions = _stopped(rl.main, recorder, "update_done", 2, flags, tmp_path, monkeypatch)
    assert sessions == 8 // 2 + 1
    name = RL_CASES[case].split("--intervention ")[1].split()[0]
    assert json.loads((folder / "summary.json").read_text())["method"].endswith(f"+{name}")
    assert exit_code(rl.main, ["--evaluate", str(folder)]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--intervention dash", "no tasks here"),
        ("--env Identity-v0 --intervention fire", "set its every"),
        ("--intervention injection", "set its step"),
        ("--intervention injection --intervention.step 3", "needs linear output layers"),
        ("--intervention redo --intervention.tau 2", "redo: tau=2.0"),
        ("--intervention replay", "there are none here"),
        ("--intervention hare-tortoise", "its period is 500, and the last optimizer step of this"),
        ("--intervention red", "Did you mean 'redo'"),
    ],
)
def test_what_cannot_work_without_tasks(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(rl.main, f"{RL} {flags} --runs-dir {tmp_path}".split()) == 2
    assert message in error_line(capsys.readouterr().err)


def test_a_fresh_network_leaves_nothing_to_inject_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{CL} --method fresh --intervention injection --runs-dir {tmp_path}"
    assert exit_code(cl.main, flags.split()) == 2
    assert "use --method dense" in error_line(capsys.readouterr().err)

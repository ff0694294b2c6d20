"""TensorBoard shows the same curves and pictures of a run that was stopped and resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import exit_code
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agents.recorder
import cl_benchmarks.recorder
from agents.board import STEPS_PER_S
from dynmoe import cl, rl

COMMANDS = {
    "cl": (
        cl.main,
        "--preset smoke --chunks 2 --epochs 2 --protocol.images 150 --network.hidden 16 "
        "--network.width 8 --eval-samples 50 --probe-samples 40 --compare",
        cl_benchmarks.recorder.TaskRecorder,
        "epoch_done",
        {"experts/class/blocks.0", "experts/task/blocks.0", "experts/similarity/blocks.0"},
    ),
    "cl, old tasks": (
        cl.main,
        "--preset smoke --protocol domains --chunks 2 --epochs 2 --batch-size 300 --compare "
        "--network.hidden 16 --network.width 8 --eval-samples 50 --probe-samples 40",
        cl_benchmarks.recorder.TaskRecorder,
        "epoch_done",
        {"1 accuracy by task/matrix of tasks", "experts/task/blocks.0"},
    ),
    "rl": (
        rl.main,
        "--preset smoke --encoder.hidden 16 --encoder.widths 16 --num-envs 4 --rollout-steps 16 "
        "--total-steps 512 --minibatches 2 --epochs 2 --probe-every 3 --probe-samples 32",
        agents.recorder.UpdateRecorder,
        "update_done",
        {"1 play/router in the deepest episode", "experts/floor/actor.0", "experts/floor/critic.0"},
    ),
}


def _shown(runs: Path, command: str) -> dict[str, list[Any]]:
    """Tag -> (step, value or picture) of all scalars and images, times excepted."""
    events = EventAccumulator(str(runs / command[:2] / "x" / "seed-0"))
    events.Reload()
    tags = events.Tags()
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in tags["scalars"]
        if tag != STEPS_PER_S
    }
    images = {
        tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)]
        for tag in tags["images"]
    }
    return scalars | images


@pytest.mark.parametrize("command", COMMANDS)
def test_a_resumed_run_shows_every_point_and_picture_once(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags, recorder, moment, pictures = COMMANDS[command]

    def run(runs: str) -> int:
        return exit_code(main, [*flags.split(), *f"--name x --resume --runs-dir {runs}".split()])

    assert run(f"{tmp_path / 'whole'}") == 0
    original, calls = getattr(recorder, moment), []

    def signalled(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        original(self, *args)

    monkeypatch.setattr(recorder, moment, signalled)
    assert [run(f"{tmp_path / 'cut'}") for _ in range(2)] == [143, 0]
    whole, cut = (_shown(tmp_path / name, command) for name in ("whole", "cut"))
    assert pictures <= whole.keys() == cut.keys()
    scalars = [tag for tag in whole if type(whole[tag][0][1]) is float]
    assert 20 < len(scalars) <= 60
    assert min(scalars) in ("1 accuracy by task/at end, test", "1 play/return")
    experts = [value for _, value in whole["2 growth/experts"]]
    assert experts == sorted(experts) and experts[0] < experts[-1]
    for tag in whole:
        assert whole[tag] == cut[tag] and len(whole[tag]) > 0, tag
    steps = [step for tag in pictures for step, _ in whole[tag]]
    assert len(steps) > len(set(steps)) > 1

"""Evaluations during a run: training does not feel them, and the best agent is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agents import evaluator, experiment, playing
from agents.evaluate import play, print_achievements
from agents.experiment import ReinforcementLearning
from agents.making import make_env, make_policy
from agents.playing import run_evaluation
from agents.settings import Config
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.lab import checkpoint
from dynmoe.lab.runner import Done, run_one
from envs.debug import Stages


def ran(folder: Path, name: str, **options: Any) -> tuple[Config, Done]:
    """A short run that learns a little."""
    made = {
        "env": "CartPole-v1", "num_envs": 4, "rollout_steps": 32, "minibatches": 2, "lr": 3e-3,
        "total_steps": 1024, "probe_every": 4, "normalize_observations": True,
        "method": registry.get("agent", "dense").Config(), "runs_dir": folder, "name": name,
        "encoder": registry.get("encoder", "mlp").Config(hidden=16, widths=(16,)),
        "trigger": registry.get("trigger", "every").Config(steps=512),
    }  # fmt: skip
    config = Config(**(made | options))
    return config, run_one(ReinforcementLearning(), "", config)


def state_of(done: Done, part: str = "checkpoints") -> dict[str, Any]:
    saved = checkpoint.load_latest(done.folder / part)
    assert saved is not None
    return saved["state"]


def test_training_does_not_feel_it(tmp_path: Path) -> None:
    _, plain = ran(tmp_path, "plain")
    _, watched = ran(tmp_path, "watched", eval_every=256)
    one, other = state_of(plain), state_of(watched)
    for name, value in one["policy"].items():
        assert torch.equal(value, other["policy"][name]), name
    assert (
        one["env"]["normaliser"]["observations"]["count"]
        == (other["env"]["normaliser"]["observations"]["count"])
    )
    assert [s for s, _ in watched.summary["evaluations"]] == [256, 512, 768, 1024]
    assert "evaluations" not in plain.summary


def test_the_best_is_kept_and_plays_as_it_was_scored(tmp_path: Path) -> None:
    config, done = ran(tmp_path, "best", eval_every=256)
    scores = dict(done.summary["evaluations"])
    steps, score = done.summary["best_evaluation"]
    assert score == max(scores.values()) == scores[steps]
    state = state_of(done, "best")
    assert state["update"] * config.batch_size == steps
    env = make_env(config, torch.device("cpu"))
    env.normalise_as(state["env"])
    policy = make_policy(config, env, torch.device("cpu"), config.intervention.build())
    policy.load_state_dict(state["policy"])
    episodes, _, _ = play(env, policy, config.seed, config.eval_steps)
    assert sum(e.episode_return for e in episodes) / len(episodes) == pytest.approx(score)
    run_evaluation(replace(config, evaluate=done.folder / "best"))
    assert list(done.folder.glob(f"evaluation-{steps}-*.json"))


class Harder(gymnasium.Env):
    """Remembers its episodes, of 4 steps each: one step pays the number of the episode."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episodes, self.steps = self.episodes + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        return np.zeros(2, np.float32), float(self.episodes), False, self.steps == 4, {}


def test_each_evaluation_is_in_worlds_that_nobody_has_played_in(tmp_path: Path) -> None:
    gymnasium.register("Harder-v0", Harder)
    try:
        _, done = ran(tmp_path, "harder", env="Harder-v0", eval_every=512, eval_steps=4)
    finally:
        del gymnasium.registry["Harder-v0"]
    assert done.summary["evaluations"] == [[512, 4.0], [1024, 4.0]]


class Shifting(Stages):
    """Stages-v0 in three phases of 256 steps, as Craftax-Phases-v1: the floor that all begin on."""

    taken = 0

    @property
    def phase(self) -> int:  # type: ignore[override]
        return min(self.taken // 256, 2)

    def reset(self, **kwargs: Any) -> Any:
        self.taken = 0
        return super().reset(**kwargs)

    def step(self, actions: Any) -> Any:
        self.taken += self.num_envs
        return super().step(actions)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "taken": torch.tensor(self.taken)}

    def phase_in(self, state: dict[str, Any]) -> int:
        return min(int(state["taken"]) // 256, 2)


def test_evaluations_are_in_the_phase_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `--evaluate` is in the newest one."""
    env = Shifting("Stages-v0", 4, longest=16)
    for module in (experiment, evaluator, playing):
        monkeypatch.setattr(module, "make_env", lambda *_: Shifting("Stages-v0", 4, longest=16))
    config, done = ran(
        tmp_path, "phases", env="Stages-v0", normalize_observations=False, eval_every=256,
        method=registry.get("agent", "untrained").Config(),
    )  # fmt: skip
    device, state = torch.device("cpu"), state_of(done)
    policy = make_policy(config, env, device, config.intervention.build())
    policy.load_state_dict(state["policy"])
    phases = [play(env.on_phase(k), policy, config.seed, 2000)[0] for k in range(3)]
    wanted = [sum(e.episode_return for e in played) / 4 for played in phases]
    assert len(set(wanted)) == 3
    assert [score for _, score in done.summary["evaluations"]] == [*wanted[1:], *wanted[2:] * 2]
    run_evaluation(replace(config, evaluate=done.folder))
    (path,) = done.folder.glob("evaluation-1024-*.json")
    assert json.loads(path.read_text())["return_mean"] == wanted[2]


def test_a_run_is_filmed_at_its_end_and_only_once(tmp_path: Path) -> None:
    """Also where vectors are observed; a finished run that lacks its video gets the same one."""
    config, done = ran(tmp_path, "film", total_steps=256, video=Path("end.mp4"), max_steps=90)
    path = done.folder / "end.mp4"
    first = pictures_of(path)
    assert first.shape[1:] == (200, 300, 3) and 8 <= len(first) <= 90
    assert (np.diff(first, axis=0) != 0).any(axis=(1, 2, 3)).all()
    path.write_bytes(b"kept")
    run_one(ReinforcementLearning(), "", replace(config, resume=True))
    assert path.read_bytes() == b"kept"
    path.unlink()
    run_one(ReinforcementLearning(), "", replace(config, resume=True))
    again = pictures_of(path)
    assert again.shape == first.shape
    assert np.abs(again - first).mean(axis=(1, 2, 3)).max() < 0.01  # a codec is no checkpoint


def pictures_of(path: Path) -> NDArray[np.int64]:
    """The frames of a video, `[L, H, W, 3]`."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return np.stack(frames).astype(np.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"env": "Blackjack-v1", "video": Path("a/x.mp4")}, "into its own folder; give a name alone"),
     ({"env": "Identity-v0", "video": Path("x.mp4"), "normalize_observations": False},
      r"vectors of shape \(5,\), no images, and has no rgb_array")],
)  # fmt: skip
def test_what_cannot_be_filmed_is_refused_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        ran(tmp_path, "x", **options)
    assert not list(tmp_path.rglob("*.pt"))


def test_achievements_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    print_achievements({"collect wood": 0.25, "eat cow": 0.5, "diamond": 0.0}, "title")
    shown = capsys.readouterr().out
    assert shown.index("eat cow") < shown.index("collect wood") and "25.0 %" in shown
    assert "1 other achievement" in shown and "diamond" not in shown

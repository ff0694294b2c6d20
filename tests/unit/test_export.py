"""Exported networks: the same outputs as the trained ones, without data; bad input is one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.experiment import ReinforcementLearning
from agents.making import make_env
from agents.settings import Config as AgentConfig
from cl_benchmarks.experiment import ContinualLearning
from dynmoe import cl
from dynmoe.dg import __main__ as dg
from dynmoe.errors import DynmoeError, ResourceError, UserError
from dynmoe.experiments.dg.experiment import DomainGeneralisation
from dynmoe.experiments.tta.experiment import TestTimeAdaptation
from dynmoe.export import export, load, main
from dynmoe.lab import checkpoint
from dynmoe.lab.config import run_command
from dynmoe.lab.export import equal_states, put_back, take_out
from dynmoe.lab.runner import Done, run_one
from dynmoe.registry import get
from dynmoe.tta import __main__ as tta


def stream_run(runs: Path, **changes: Any) -> Done:
    """Three tasks, a step or two each."""
    small = replace(
        cl.presets()["smoke"], runs_dir=runs, compare=(), chunks=3, epochs=1, eval_samples=20,
        probe_samples=20, old_samples=20, protocol=get("protocol", "shuffle").Config(images=150),
        network=get("network", "mlp").Config(width=16, hidden=24),
    )  # fmt: skip
    return run_one(ContinualLearning(), "smoke", replace(small, **changes))


def policy_run(runs: Path, **changes: Any) -> tuple[AgentConfig, Done]:
    made = {
        "env": "Pendulum-v1", "num_envs": 2, "rollout_steps": 16, "minibatches": 2, "eval_every": 0,
        "total_steps": 64, "probe_every": 2, "runs_dir": runs, "normalize_observations": True,
        "encoder": get("encoder", "mlp").Config(hidden=16, widths=(16,)),
        "trigger": get("trigger", "every").Config(steps=32),
    }  # fmt: skip
    config = AgentConfig(**(made | changes))
    return config, run_one(ReinforcementLearning(), "", config)


@torch.no_grad()
def outputs(model: nn.Module | None, x: Tensor) -> Tensor:
    assert model is not None
    torch.manual_seed(0)
    return model.eval()(x)


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_states_come_back_bit_for_bit() -> None:
    state = {
        "a": {"b": [torch.tensor([1.5, math.nan]), {3: torch.ones(2, dtype=torch.int8)}]},
        "inf": -math.inf, "none": None, "texts": ["x", True, 2, 0.1], "view": torch.eye(3).T[:2],
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(take_out(state, tensors), allow_nan=False))
    again = put_back(plain, tensors)
    assert again["inf"] == -math.inf and again["texts"] == state["texts"]
    assert again["a"]["b"][1][3].dtype == torch.int8 and again["none"] is None
    assert equal_states({**state, "a": 0}, {**again, "a": 0})
    assert not equal_states(state, {**again, "none": 0})
    with pytest.raises(TypeError, match=r"a\.0 is a set"):
        take_out({"a": [{1}]}, {})


@pytest.mark.parametrize(
    ("method", "intervention"),
    [("dynamicmoe", "none"), ("progressive", "none"), ("dense", "injection")],
)
def test_a_stream_network(method: str, intervention: str, tmp_path: Path) -> None:
    done = stream_run(
        tmp_path,
        method=get("method", method).Config(),
        intervention=get("intervention", intervention).Config(),
    )
    out = export(done.folder, tmp_path / "out", licence="mit")
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(outputs(load(out), x), outputs(done.model, x))
    card = (out / "README.md").read_text()
    last = done.summary["tasks"][-1]["train_accuracy"]
    assert card.startswith('---\nlicense: "mit"\n') and "digits, shuffle stream, mlp" in card
    assert f"| train accuracy, last task | {100 * last:.1f} % |" in card
    assert "| protocol.images | 150 |" in card and str(tmp_path) not in card.split("## Metrics")[1]
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "model.json", "README.md"}


def test_a_policy_and_its_normalised_observations(tmp_path: Path) -> None:
    config, done = policy_run(tmp_path)
    model = load(export(done.folder, tmp_path / "out"))
    saved = checkpoint.load_latest(done.folder / "checkpoints")
    assert saved is not None and done.model is not None
    seen = saved["state"]["env"]["normaliser"]["observations"]
    x = 3 * torch.randn(4, 3)
    as_trained = (x.double() - seen["mean"]) / (seen["var"] + 1e-8).sqrt()
    expected = done.model.eval()(as_trained.clamp(-10, 10).float())
    for one, other in zip(model(x), expected, strict=True):
        torch.testing.assert_close(one, other)
    env = make_env(config, torch.device("cpu"))
    assert torch.equal(model[1].distribution.low, torch.as_tensor(env.single_action_space.low))
    env.close()
    inside = done.folder / "checkpoints"
    for number, place in enumerate((inside, min(inside.glob("*.pt")))):
        out = export(place, tmp_path / str(number))
        assert "not those of the end of a finished run" in (out / "README.md").read_text()


class Noise(gymnasium.Env):
    """Shows images of 4 x 6 bytes in 3 colours."""

    observation_space = gymnasium.spaces.Box(0, 255, (4, 6, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.np_random.integers(9, 200, (4, 6, 3), np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.np_random.integers(9, 200, (4, 6, 3), np.uint8), 0.0, False, False, {}


def test_normalised_images_go_in_as_the_network_takes_images(tmp_path: Path) -> None:
    """Channels first, and as bytes."""
    gymnasium.register("Noise-v0", Noise)
    config, done = policy_run(tmp_path, env="Noise-v0")
    out = export(done.folder, tmp_path / "out")
    env = make_env(config, torch.device("cpu"))
    del gymnasium.registry["Noise-v0"]
    saved = checkpoint.load_latest(done.folder / "checkpoints")
    assert saved is not None and done.model is not None
    env.normalise_as(saved["state"]["env"])
    scaled = env.unpack(env.reset(seed=1)[0])
    raw = env.pictures()
    assert raw is not None and raw.dtype == torch.uint8
    for one, other in zip(load(out)(raw.movedim(-1, 1)), done.model.eval()(scaled), strict=True):
        torch.testing.assert_close(one, other)
    card = (out / "README.md").read_text()
    assert "values as the environment gives them [B, C, H, W], of shape 3 4 6 each" in card
    env.close()


def test_the_best_agent_is_not_the_last(tmp_path: Path) -> None:
    """Nobody gets up the mountain, so that the first of equals is the best."""
    _, done = policy_run(tmp_path, env="MountainCar-v0", eval_every=32, eval_steps=200)
    best = checkpoint.load_latest(done.folder / "best")
    last = checkpoint.load_latest(done.folder / "checkpoints")
    assert best is not None and last is not None and best["step"] < last["step"]
    out = export(done.folder / "best", tmp_path / "out")
    made = load(out)[1].state_dict()  # type: ignore[index]
    assert equal_states(made, best["state"]["policy"])
    assert not equal_states(made, last["state"]["policy"])
    assert f"the weights after step {best['step']}, not those" in (out / "README.md").read_text()


def test_an_adapter_goes_on_as_it_would_have(tmp_path: Path) -> None:
    config = replace(
        tta.presets()["smoke"], compare=(), streams=("fog+clean",), limit=8, gates=0,
        routing_batches=0, runs_dir=tmp_path, keep_model=True,
        method=get("tta", "cotta").Config(),
    )  # fmt: skip
    done = run_one(TestTimeAdaptation(), "smoke", config)
    model = load(export(done.folder, tmp_path / "out"))
    assert isinstance(model, nn.Module) and done.model is not None
    for _ in range(2):  # it learns, restores weights of the source, and draws as the run would
        x = torch.randn(4, 3, 16, 16)
        assert torch.equal(model(x), done.model(x))
    again = replace(config, keep_model=False, name="bare")
    bare = run_one(TestTimeAdaptation(), "smoke", again)
    with pytest.raises(UserError, match=r"bare.* has kept no network; .* --keep-model$"):
        export(bare.folder, tmp_path / "bare")


def test_networks_of_left_out_domains(tmp_path: Path) -> None:
    config = replace(
        dg.presets()["smoke"], compare=(), steps=2, features=0, runs_dir=tmp_path, keep_model=True,
        test_domains=("plain", "edges"),
    )  # fmt: skip
    done = run_one(DomainGeneralisation(), "smoke", config)
    one, other = export(done.folder, tmp_path / "1"), export(done.folder, tmp_path / "2", "edges")
    models: list[Any] = [load(one), load(other)]
    x = torch.randn(2, 3, 32, 32)
    first, second = (outputs(model, x) for model in models)
    assert first.shape == (2, 3) and not torch.equal(first, second)
    kept = checkpoint.load_latest(done.folder / "models" / "2")
    assert kept is not None
    assert all(torch.equal(models[1].state_dict()[k], v) for k, v in kept["state"].items())
    assert "Trained on all domains but edges" in (other / "README.md").read_text()
    with pytest.raises(UserError, match="unknown part 'coloured'"):
        export(done.folder, tmp_path / "x", "coloured")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, full = tmp_path / "out", tmp_path / "full"
    done = stream_run(tmp_path / "runs")
    full.mkdir()
    (full / "README.md").write_text("mine")
    capsys.readouterr()
    assert "name the run's folder" in error_of([], capsys)
    assert "has no config.json" in error_of([str(tmp_path), str(out)], capsys)
    assert "holds other files" in error_of([str(done.folder), str(full)], capsys)
    said = error_of([str(done.folder), str(out), "--part", "x"], capsys)
    assert "--part has no effect" in said and not out.exists()
    assert (full / "README.md").read_text() == "mine"
    main([str(done.folder), str(out)])
    assert "exported:" in capsys.readouterr().out
    about = json.loads((out / "model.json").read_text())
    (out / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ResourceError, match="cannot be read"):
        load(out)
    (out / "model.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load(out)
    with pytest.raises(DynmoeError, match=r"has no model\.json"):
        load(tmp_path)

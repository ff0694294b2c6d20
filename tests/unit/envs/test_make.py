"""`envs.make`: every kind of name, what is refused and how, and JAX's set-up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import envs
from dynmoe.errors import UserError
from envs import jax_setup
from envs.jax_setup import Program

ROOT = Path(__file__).parents[3]
PIXELS, SYMBOLIC = "Craftax-Classic-Pixels-v1", "Craftax-Symbolic-v1"


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"name": "Craftax-Pixel-v1"}, ["'Craftax-Pixel-v1'", "mean 'Craftax-Pixels-v1'?"]),
        ({"name": "Stage-v0"}, ["Did you mean 'Stages-v0'?"]),
        ({"name": "CartPol-v1"}, ["Did you mean 'CartPole-v1'?"]),
        ({"name": "?"}, ["known: Craftax-Pixels-v1", "Stages-v0", "gymnasium id."]),
        ({"num_envs": 0}, ["num_envs 0", "1 or more"]),
        ({"observation": "frames"}, ["'frames'", "codes, pixels, pixels-float"]),
        ({"renderer": "slow"}, ["'slow'", "fast, upstream"]),
        ({"renderer": "upstream"}, ["no codes", "'pixels' or 'pixels-float'"]),
        ({"env_device": "tpu"}, ["'tpu'", "auto, cpu, cuda"]),
        ({"max_timesteps": 0}, ["max_timesteps 0", "1 or more"]),
        ({"device": "cuda:99"}, ["'cuda:99' is not there"]),
        ({"device": "abacus"}, ["'abacus'", "allowed: auto, cpu"]),
        ({"name": SYMBOLIC, "observation": "codes"}, ["vectors", "use Craftax-Pixels-v1"]),
        ({"name": SYMBOLIC, "renderer": "upstream"}, ["vectors", "use Craftax-Pixels-v1"]),
        ({"name": "Stages-v0", "observation": "codes"}, ["observation 'codes'", "Craftax only"]),
        ({"name": "CartPole-v1", "max_timesteps": 5}, ["max_timesteps 5", "Craftax only"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    settings: dict[str, Any], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_setup, "load", lambda *_: pytest.fail("compiled before it refused"))
    with pytest.raises(UserError) as caught:
        envs.make(**{"name": PIXELS, "num_envs": 2, **settings})
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_a_device_that_jax_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="JAX has no device cuda:99, only "):
        jax_setup.device("cuda", 99)
    assert jax_setup.has("cpu") and not jax_setup.has("cuda", 99)


@pytest.mark.parametrize("name", ["Stages-v0", "CartPole-v1"])
def test_other_environments(name: str) -> None:
    env = envs.make(name, 2, seed=3)
    observations, _ = env.reset()
    assert observations.shape[0] == env.num_envs == 2
    assert torch.equal(observations, envs.make(name, 2, seed=3).reset()[0])
    env.close()


def build_square(calls: list[int]) -> Any:
    """The programs of a small game, counting how often they are built."""
    import jax

    def build() -> tuple[dict[str, Program], dict[str, Any]]:
        calls.append(1)
        print("loading textures")
        like = {"x": jax.ShapeDtypeStruct((3,), np.float32)}
        return {
            "square": Program(lambda tree: {"y": tree["x"] ** 2}, (like,)),
            "raise": Program(lambda tree: {"x": tree["x"] + 1}, (like,), donate=True),
        }, {"colour": "green"}

    return build


def test_programs_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    import jax

    calls: list[int] = []
    place = jax_setup.device("cpu")
    for _ in range(2):
        loaded = jax_setup.load("Square Game", ["envs.vector"], place, build_square(calls))
        x = {"x": jax.device_put(np.arange(3, dtype=np.float32), place)}
        assert loaded.run["square"](x)["y"].tolist() == [0, 1, 4]
        assert loaded.run["raise"](x)["x"].tolist() == [1, 2, 3]
        assert x["x"].is_deleted()  # its memory was taken
        assert loaded.facts == {"colour": "green"}
        assert loaded.takes["raise"][0]["x"].shape == loaded.gives["square"]["y"].shape == (3,)
    assert calls == [1]
    jax_setup.load("Square Game", ["envs.debug"], place, build_square(calls))  # another source
    jax_setup.load("Square Games", ["envs.vector"], place, build_square(calls))  # another name
    assert calls == [1, 1, 1]
    assert capsys.readouterr().out == ""


def test_a_program_with_other_settings_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    before = jax_setup._digest(["envs.vector"])
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        assert jax_setup._digest(["envs.vector"]) != before
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")
    assert jax_setup._digest(["envs.vector"]) == before
    monkeypatch.setattr(jax_setup.metadata, "version", lambda package: "0")
    assert jax_setup._digest(["envs.vector"]) != before


def test_compilation_is_told_after_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    with jax_setup._telling("compiling A for 3 environments", first_s=0.05, every_s=0.05):
        time.sleep(0.25)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) >= 2
    assert lines[0] == "compiling A for 3 environments, 0 s so far; later starts take seconds"
    with jax_setup._telling("compiling A", first_s=5):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("writable", [True, False])
def test_set_up(tmp_path: Path, writable: bool) -> None:
    """In a process of its own: where programs are kept, what is set, and what is said."""
    folder = tmp_path / "cache"
    if not writable:
        folder.write_text("a file where a folder should be")
    code = """
import os, sys
from envs import jax_setup
assert "jax" not in sys.modules
jax = jax_setup.prepare()
assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
jax_setup.prepare()
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_PREALLOCATE", "DYNMOE_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if writable:
        assert done.stdout.split() == [str(folder / "dynmoe" / "jax"), "0"] and not done.stderr
    else:
        assert done.stdout.split()[0] == "None"
        assert len(done.stderr.splitlines()) == 1 and "cannot be written" in done.stderr


def test_an_environment_without_phases_says_so() -> None:
    env = envs.make("CartPole-v1", 2)
    with pytest.raises(UserError, match="CartPole-v1 has no phases; use Craftax-Phases-v1"):
        env.on_phase(0)

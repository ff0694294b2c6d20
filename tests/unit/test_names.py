"""Names of run folders: what differs from the preset, and the hash that says which settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynmoe import cl, rl
from dynmoe.lab.config import RunConfig, digest, parse
from dynmoe.lab.names import LONGEST, of_others, preset_and_changes
from dynmoe.lab.run import Run


def named(command: Any, flags: str) -> str:
    presets = command.presets()
    preset, config = parse(presets, flags.split(), "x", "What it does.")
    return preset_and_changes(preset, presets[preset], config)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "laptop"),
        ("--preset smoke --seed 3 --name x --runs-dir y --threads 1", "smoke"),
        ("--method dense --allow-unused", "laptop"),  # the rest of the name has the method
        ("--granularity 3", "laptop-granularity=3"),
        ("--preset smoke --router topk --router.k 1", "smoke-router=topk_router.k=1"),
        ("--router topk --router.k 2", "laptop-router=topk"),  # its own default
        ("--dataset folder --dataset.data-dir a/b --dataset.size 32", "laptop-dataset.size=32"),
        ("--lr 1e-4 --epochs 3", "laptop-epochs=3_lr=0.0001"),
    ],
)
def test_what_differs_from_the_preset(flags: str, name: str) -> None:
    assert named(cl, flags) == name


def test_runs_compared_with_do_not_name_the_main_methods_options() -> None:
    for flags, name in (
        (
            "--intervention l2-init --intervention.strength 0.5 --method dense --epochs 3",
            "epochs=3",
        ),
        ("--intervention l2-init --intervention.strength 0.5 --method dense", ""),
    ):
        begins = named(cl, f"{flags} --allow-unused")
        assert "intervention.strength=0.5" in begins
        assert of_others(begins) == "-".join(filter(None, ["laptop", name]))
    assert of_others("laptop-router=topk_router.k=1") == "laptop-router=topk_router.k=1"
    assert of_others("tiny-long-lr=1_method.a=2_method.b=x-y_clip=3") == "tiny-long-lr=1_clip=3"


def test_long_names_are_cut() -> None:
    flags = "--epochs 3 --batch-size 7 --lr 0.123 --granularity 3 --chunks 4 --reset-optimizer"
    preset, config = parse(cl.presets(), flags.split(), "x", "What.")
    name = preset_and_changes(preset, cl.presets()[preset], config)
    assert name == "laptop-granularity=3_chunks=4_epochs=3_batch-size=7_lr=0.123_1-more"
    assert len(name) <= len("laptop-") + LONGEST + len("_99-more")


def test_values_make_good_folder_names() -> None:
    name = named(rl, """--env CartPole-v1 --encoder mlp --env-args {"a":"b/c:d"}""")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz=.+-_0123456789") and "env-args=" in name


def test_a_folder_of_these_settings_is_found_whatever_its_name_says(tmp_path: Path) -> None:
    config = RunConfig(runs_dir=tmp_path, device="cpu")
    new = Run("cl", "laptop-granularity=2", config, "m").name
    assert new == f"laptop-granularity=2-m-{digest(config)}"
    old = f"laptop-m-{digest(config)}"
    (tmp_path / "cl" / old).mkdir(parents=True)
    assert Run("cl", "laptop-granularity=2", config, "m").name == old
    assert Run("cl", "minute", config, "m").name == f"minute-m-{digest(config)}"
    other = replace(config, threads=1)
    assert Run("cl", "laptop-granularity=2", other, "m").name.endswith(digest(other))
    (tmp_path / "cl" / new).mkdir()
    assert Run("cl", "laptop-granularity=2", config, "m").name == new

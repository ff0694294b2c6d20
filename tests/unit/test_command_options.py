"""The commands' help, the options that they refuse as without effect, and their use from Python."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import agents.settings
import cl_benchmarks.settings
import dynmoe.dg.__main__ as dg
import dynmoe.tta.__main__ as tta
from cl_benchmarks.method import Horizon, Training
from cl_benchmarks.networks import dense_block
from dynmoe import cl, registry, rl
from dynmoe.errors import UserError
from dynmoe.growth.settings import GROWTH, LAYER
from dynmoe.lab import load_runs
from dynmoe.lab.config import parse, slots
from dynmoe.lab.help import texts
from dynmoe.lab.results import find_runs

COMMANDS: dict[str, Any] = {"cl": cl, "rl": rl, "tta": tta, "dg": dg}
PRESETS = [(name, preset) for name, command in COMMANDS.items() for preset in command.presets()]


def read(command: str, flags: str) -> Any:
    return parse(COMMANDS[command].presets(), flags.split(), command, "What it does.")[1]


# help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_help_is_short_and_names_every_option_once(
    name: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        COMMANDS[name].main(["--help", "--preset", preset])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert len(lines) < 80 and max(map(len, lines)) <= 100
    config = COMMANDS[name].presets()[preset]
    options = [word for line in lines for word in line.split() if word.startswith("--")]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"--{'no-' if value is True else ''}{field.name.replace('_', '-')}"
        below = [f"{flag}." in option for option in options]
        assert flag in options or any(below), flag
        begins = [line for line in lines if line.split()[:1] == [flag]]
        assert len(begins) <= 1, flag
    for title in config.GROUPS:
        assert f"{title}:" in lines
    for field_name, kind in slots(config).items():
        others = set(registry.names(kind)) - {getattr(config, field_name).part.name}
        assert not any(registry.summary(kind, other) in "\n".join(lines) for other in others)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_in_one_group_and_has_a_text(name: str) -> None:
    kind = COMMANDS[name].Config
    grouped = [field for fields in kind.GROUPS.values() for field in fields]
    assert sorted(grouped) == sorted(f.name for f in dataclasses.fields(kind))
    assert set(getattr(kind, "BRIEF", ())) <= set(kind.GROUPS)
    own_texts = {"budget", "new_experts", "old_experts"}
    plain = {f.name for f in dataclasses.fields(kind)} - set(slots(kind)) - own_texts
    assert plain - {"vit", "embedded"} <= set(texts(kind))


@pytest.mark.parametrize(
    ("command", "flags", "field", "value"),
    [
        ("rl", "--no-anneal-lr", "anneal_lr", False),
        ("rl", "--anneal-lr", "anneal_lr", True),
        ("dg", "--preset paper --no-augment", "augment", False),
        ("dg", "--augment", "augment", True),
    ],
)
def test_a_bool_has_a_flag_for_each_value(
    command: str, flags: str, field: str, value: bool
) -> None:
    assert getattr(read(command, flags), field) is value


# options without effect ---------------------------------------------------------------------------

MOE = (
    "--granularity 3", "--router topk", "--router.temperature 0.5", "--bank swiglu",
    "--gate-scale one", "--balance switch", "--regularizer z", "--shared-hidden 4",
    "--share-router", "--trigger at --trigger.steps 5", "--budget.mode per-growth",
    "--budget.units 3", "--pruning utility", "--init duplicate", "--moments zero",
    "--new-experts.lr 2",
    "--new-experts.lr-steps 5",
)  # fmt: skip
PPO = ("--lr 1", "--no-anneal-lr", "--adam-eps 1e-3", "--epochs 2", "--minibatches 2", "--clip 1",
       "--gae-lambda 0.5", "--no-clip-value", "--entropy 0", "--value-weight 1",
       "--max-grad-norm 1", "--no-normalise-advantage", "--intervention redo")  # fmt: skip
WITHOUT_EFFECT = {
    "cl": [
        *(f"--method dense --compare fresh redo {moe}" for moe in MOE),
        "--method wide --compare --granularity 3",
        "--method moe-static --compare --pruning utility",
        "--method moe-static --method.experts 4 --compare --granularity 3",
        "--method net2wider --compare --router topk",
        "--method progressive --method.units 4 --compare --budget.mode per-growth",
        "--momentum 0.5", "--optimizer adamw --momentum 0.5", "--optimizer sgd --moments zero",
        "--budget.units 3", "--new-experts.lr-steps 3", "--new-experts.logit-steps 3",
        "--budget.mode per-growth --pruning utility", "--trigger stage",
        "--method fresh --compare --reset-optimizer",
        "--intervention injection --intervention.step 5 --intervention.task 1",
        "--intervention fire --intervention.factor svd --intervention.iterations 5",
        "--intervention shrink-perturb --intervention.towards-init --intervention.sigma 0.5",
    ],
    "rl": [
        *(f"--method dense {moe}" for moe in MOE),
        *(f"--method random --compare untrained {option}" for option in PPO),
        "--method wide --router topk",
        "--method moe-start --pruning utility --budget.mode constant",
        "--max-steps 5", "--pruning utility",
        "--intervention injection --intervention.step 5 --intervention.task 1",
        "--evaluate x --preset smoke", "--evaluate x --lr 1", "--evaluate x --name y",
        "--evaluate x --router.temperature 1",
    ],
    "tta": [
        "--data-dir .", "--model x", "--pretrained", "--weights x", "--labels subset",
        "--on-the-fly", "--data imagenet --vit.patch 4", "--data imagenet --embedded.size 32",
        "--order gradual --severity 3", "--streams clean --severity 3",
        "--gates 8 --compare noadapt", "--streams clean --gates 8", "--clean-images 5",
        "--method noadapt --compare --lr-scale 2",
        "--method tent --compare noadapt --routing-batches 3",
        "--size 32", "--train-source", "--data imagenet --source.epochs 1",
        "--data imagenet --corrupted-dir x", "--data tiny-imagenet --on-the-fly",
        "--data folder --stem-weights x", "--data folder --train-source --model resnet18",
        "--data folder --train-source --model stem-vit --std 1 1 1",
    ],
    "dg": [
        "--pretrained", "--weights x", "--model x --vit.depth 3", "--trigger every",
        "--trigger.steps 5", "--init random", "--granularity 1 --trigger.steps 100000",
        "--granularity 1 --trigger task", "--granularity 1 --trigger stage",
        "--granularity 1 --trigger rank", "--eval-every 100000",
    ],
}  # fmt: skip
"""Command -> flags whose last option, or the one it belongs to, changes nothing."""


@pytest.mark.parametrize(
    ("command", "flags"), [(c, flags) for c, all_ in WITHOUT_EFFECT.items() for flags in all_]
)
def test_an_option_without_effect_is_refused(command: str, flags: str) -> None:
    with pytest.raises(UserError, match=r"--[a-z.-]+ has no effect: .+ \(or accept it with") as e:
        read(command, flags)
    assert str(e.value).split()[0] in flags and e.value.exit_code == 2


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("cl", f"--method dense --compare dynamicmoe {' '.join([*MOE[:2], *MOE[3:10]])}"),
        ("cl", "--method dense --compare fresh --router topk --allow-unused"),
        ("cl", "--method dense --compare dynamicmoe --new-experts.lr 2 --new-experts.lr-steps 5"),
        ("cl", "--method moe-static --granularity 3"),
        ("cl", "--optimizer sgd --momentum 0.5"),
        ("rl", "--method dense --compare dynamicmoe --router topk"),
        ("rl", "--method random --compare dense --lr 1"),
        ("rl", "--method dense --video x.mp4 --max-steps 5"),
        ("rl", "--evaluate x --video y.mp4 --max-steps 5 --seed 3"),
        ("tta", "--data imagenet --data-dir . --model x --pretrained"),
        ("tta", "--method noadapt --routing-batches 3 --compare moetta:lr=1"),
        ("dg", "--granularity 1 --trigger.steps 50 --init random"),
        ("dg", "--model x --pretrained"),
    ],
)
def test_an_option_with_an_effect_is_not(command: str, flags: str) -> None:
    read(command, flags)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_set_nothing_without_effect(name: str, preset: str) -> None:
    config = read(name, f"--preset {preset}")
    default = COMMANDS[name].Config()
    changed = {f.name for f in dataclasses.fields(config)
               if getattr(config, f.name) != getattr(default, f.name)}  # fmt: skip
    assert not changed & set(config.unused())


def spied(kind: type, seen: set[str]) -> Any:
    """Settings that note which of those of growth are read."""

    class Spy(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name in (*LAYER, *GROWTH):
                seen.add(name)
            return super().__getattribute__(name)

    return Spy


@pytest.mark.parametrize("name", registry.names("method"))
def test_methods_use_no_setting_but_those_they_say(name: str) -> None:
    seen: set[str] = set()
    config = spied(cl_benchmarks.settings.Config, seen)()
    method = registry.get("method", name).Config().build()
    block = method.make_block(config, Horizon(steps=100, tasks=3), 0)(8, 32, 8)
    optimizer, intervention = torch.optim.Adam(block.parameters()), config.intervention.build()
    generator = torch.Generator()
    method.plugins(config, Training(block, optimizer, generator, lambda _: block, intervention))
    assert seen <= set(method.reads())
    assert (name == "dense") <= (not method.reads())


@pytest.mark.parametrize("name", registry.names("agent"))
def test_agents_use_no_setting_but_those_they_say(name: str) -> None:
    seen: set[str] = set()
    config = spied(agents.settings.Config, seen)(trigger=registry.get("trigger", "every").Config())
    agent = registry.get("agent", name).Config().build()
    agent.make_block(config, 5000, 0)(8, 32, 4)
    assert seen <= set(agent.reads)
    assert agent.reads or isinstance(agent.make_block(config, 5000, 0)(8, 32, 4),
                                     type(dense_block(8, 8, 8)))  # fmt: skip


# from Python --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of cl with a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    config = replace(small(folder), compare=("fresh",))
    result = cl.run(config)
    assert [row.settings["method.part"] for row in result.rows] == ["dense", "fresh"]
    assert result.folder == result.rows[0].folder and isinstance(result.model, torch.nn.Module)
    again = cl.run(config)
    assert again.rows == result.rows and again.model is None
    return folder


def small(folder: Path) -> Any:
    network = registry.get("network", "mlp").Config(width=16, hidden=16)
    dense = registry.get("method", "dense").Config()
    return replace(cl.presets()["smoke"], method=dense, network=network, epochs=1, chunks=2,
                   runs_dir=folder, probe_samples=20, eval_samples=20)  # fmt: skip


def test_runs_are_rows_with_settings_and_figures(runs: Path) -> None:
    rows = find_runs(runs)
    assert {(row.command, row.seed, row.status) for row in rows} == {("cl", 0, "finished")}
    for row in rows:
        summary = json.loads((row.folder / "summary.json").read_text())
        assert row.figures["dataset"] == summary["dataset"] == "digits"
        assert row.settings["network.hidden"] == 16 and row.settings["epochs"] == 1
        means = [row.figures[f"plasticity.test_accuracy.{key}"]
                 for key in summary["plasticity"]["test_accuracy"]]  # fmt: skip
        assert means == list(summary["plasticity"]["test_accuracy"].values())


def test_broken_and_unfinished_runs(runs: Path, tmp_path: Path) -> None:
    for name, text in {"a": "{", "b": "[]", "c": "{}"}.items():
        (tmp_path / "cl" / name / "seed-0").mkdir(parents=True)
        (tmp_path / "cl" / name / "seed-0" / "config.json").write_text(text)
    folder = tmp_path / "rl" / "sweep" / "g2" / "seed-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"seed": 3, "name": "sweep/g2", "runs_dir": "runs"}')
    with pytest.warns(UserWarning, match="left out, it cannot be read") as warned:
        (row,) = find_runs(tmp_path)
    assert (row.command, row.seed, row.status, row.figures) == ("rl", 3, "unfinished", {})
    named = " ".join(str(one.message) for one in warned)
    assert all(str(tmp_path / "cl" / name / "seed-0") in named for name in "abc")


def test_load_runs_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pandas", None)
        with pytest.raises(UserError, match="pip install pandas"):
            load_runs(tmp_path)
    pytest.importorskip("pandas")
    with pytest.raises(UserError, match="no folder"):
        load_runs(tmp_path / "nowhere")


def test_load_runs_is_a_table(runs: Path) -> None:
    pytest.importorskip("pandas")
    table = load_runs(runs)
    assert len(table) == 2 and set(table["settings.method.part"]) == {"dense", "fresh"}
    assert table["figures.plasticity.test_accuracy.mean"].between(0, 1).all()

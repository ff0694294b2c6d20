"""Parts found by name, and settings read from a command line and kept as JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cl_benchmarks.settings import Config as ContinualConfig
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget
from dynmoe.lab.config import (
    RunConfig,
    difference,
    digest,
    from_dict,
    identity,
    parse,
    place,
    run_command,
    slots,
    to_dict,
)
from dynmoe.registry import Part, PartConfig, slot

PARTS = [(kind, name) for kind in registry.PACKAGES for name in registry.names(kind)]


@dataclass(frozen=True, kw_only=True)
class Settings(RunConfig):
    """Settings of a command that tests make up."""

    router: PartConfig = slot("router", "cosine")
    trigger: PartConfig = slot("trigger", "every")
    budget: Budget = dataclasses.field(default_factory=Budget)
    sizes: tuple[int, ...] = (1, 2)
    epochs: int = 5
    note: str | None = place(None)


PRESETS = {
    "small": Settings(),
    "large": Settings(
        epochs=50, router=registry.get("router", "cosine").Config(temperature=0.7)
    ),
}  # fmt: skip


def read(*argv: str) -> tuple[str, Settings]:
    return parse(PRESETS, list(argv), "prog", "What it does.")


# registry -----------------------------------------------------------------------------------------


def test_every_kind_has_parts():
    assert {kind for kind, _ in PARTS} == set(registry.PACKAGES)
    assert {"softmax", "cosine", "topk"} <= set(registry.names("router"))


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_knows_itself_and_says_what_it_is(kind, name):
    part = registry.get(kind, name)
    assert (part.kind, part.name, part.Config.part) == (kind, name, part)
    assert "Config" in part.__dict__  # its own: the link from Config to part is one to one
    line = registry.summary(kind, name)
    assert 10 < len(line) <= 100 and line[-1] in ".?", line
    assert part.__doc__ != inspect.getmro(part)[1].__doc__
    if (kind, name) != ("trigger", "at"):  # which has no default: its steps are to be given
        assert part.Config().part is part


def documented_fields(config: type) -> set[str]:
    """Fields whose definition is followed by a string, in the class or one that it inherits."""
    found = set()
    for cls in inspect.getmro(config):
        if dataclasses.is_dataclass(cls) and inspect.get_annotations(cls):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
            for field, text in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found.add(field.target.id)
    return found


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_option_of_every_part_has_a_help_text(kind, name):
    config = registry.get(kind, name).Config
    assert {f.name for f in dataclasses.fields(config)} <= documented_fields(config)


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("router", "cosin", "cosine"),
        ("pruning", "utilty", "utility"),
        ("init", "zero-ouput", "zero-output"),
    ],
)
def test_wrong_names_bring_a_suggestion(kind, wrong, right):
    with pytest.raises(UserError) as caught:
        registry.get(kind, wrong)
    message = str(caught.value)
    assert f"unknown {kind} '{wrong}'" in message and f"Did you mean '{right}'?" in message
    assert all(name in message for name in registry.names(kind))


def test_a_name_like_no_other_brings_no_suggestion():
    with pytest.raises(UserError) as caught:
        registry.get("router", "xyzzy")
    known = ", ".join(registry.names("router"))
    assert str(caught.value) == (
        f"unknown router 'xyzzy'; known: {known}. If it is your own, name its file in DYNMOE_PARTS."
    )


@pytest.fixture
def scratch(monkeypatch) -> type[Part]:
    """Base of a kind of its own, forgotten after the test."""
    monkeypatch.setitem(registry._PARTS, "scratch", {})

    class Base(Part, kind="scratch"):
        """Base."""

    return Base


def test_a_name_taken_twice_is_an_error(scratch):
    class First(scratch, name="same"):
        """First."""

    with pytest.raises(TypeError, match="scratch 'same' is defined by .*First.* and again by"):

        class Second(scratch, name="same"):
            """Second."""

    with pytest.raises(TypeError, match="router 'cosine'"):

        class Third(registry.get("router", "softmax"), name="cosine"):
            """Third."""

    assert registry._PARTS["scratch"] == {"same": First}
    assert registry.get("router", "cosine").__name__ == "CosineRouter"


def test_a_part_without_options_gets_a_config_of_its_own(scratch):
    class One(scratch, name="one"):
        """One."""

    class Two(One, name="two"):
        """Two."""

    assert One.Config is not Two.Config and One.Config().part is One and Two.Config().part is Two
    assert Part.Config is PartConfig and not hasattr(PartConfig, "part")


# command lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--cut utility", "--cut is now --pruning"),
        ("--cut=utility", "--cut is now --pruning"),
        ("--cut.option 2", "--cut.option is now --pruning.option"),
        ("--pruning redraw", "--pruning redraw is now --pruning reinit"),
        ("--strategy redo", "--strategy is now --intervention"),
        ("--strategy.tau 0.2", "--strategy.tau is now --intervention.tau"),
        ("--newborn.lr 2", "--newborn.lr is now --new-experts.lr"),
        ("--newborn.lr-steps=2", "--newborn.lr-steps is now --new-experts.lr-steps"),
    ],
)
def test_an_option_of_an_earlier_version_says_what_it_is_called_now(flags, line):
    presets = {"default": ContinualConfig()}
    with pytest.raises(UserError) as caught:
        parse(presets, flags.split(), "prog", "What it does.")
    assert str(caught.value) == line
    now = line.split(" is now ")[1].split(".")[0].split()[0][2:].replace("-", "_")
    assert hasattr(presets["default"], now)


@pytest.mark.parametrize("old", ["cut", "strategy", "newborn"])
def test_settings_saved_by_an_earlier_version_are_refused(old):
    with pytest.raises(UserError, match=f"earlier version: {old} is now .*; make the run again"):
        from_dict(ContinualConfig, {old: {"part": "none"}})


def test_the_first_preset_is_the_default():
    assert read() == ("small", PRESETS["small"])
    assert read("--preset", "large") == read("--preset=large") == ("large", PRESETS["large"])


@pytest.mark.parametrize("argv", [["--router", "softmax"], ["--router=softmax"]])
def test_a_slot_takes_a_parts_name(argv):
    _, config = read(*argv, "--epochs", "9")
    assert config == replace(
        PRESETS["small"], router=registry.get("router", "softmax").Config(), epochs=9
    )


def test_slot_options_belong_to_the_chosen_part():
    _, config = read("--router", "topk", "--router.k", "3", "--trigger.steps", "77")
    assert config.router == registry.get("router", "topk").Config(k=3)
    assert config.trigger.steps == 77
    _, config = read("--router.temperature=0.5", "--router", "softmax")  # in any order
    assert config.router == registry.get("router", "softmax").Config(temperature=0.5)


def test_naming_the_presets_own_part_keeps_the_presets_options():
    _, config = read("--preset", "large", "--router", "cosine")
    assert config.router.temperature == 0.7
    _, config = read("--preset", "large", "--router", "softmax")
    assert config.router.temperature == 1.0
    _, config = read("--router", "topk", "--router", "softmax")  # the last one wins
    assert config.router.part.name == "softmax"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--router.sharpness", "3"], "unknown option --router.sharpness"),  # of no router
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["stray"], "unexpected 'stray'"),
    ],
    ids=str,
)
def test_words_that_are_no_options(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(*argv)


@pytest.mark.parametrize("argv", [["--epochs", "many"], ["--budget.mode", "free"]], ids=" ".join)
def test_wrong_values_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert argv[0].lstrip("-") in output.out + output.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "smal"], "unknown preset 'smal'; known: small, large. Did you mean 'small'"),
        (["--router", "cosin"], "Did you mean 'cosine'"),
        (["--router"], "--router needs a value"),
        (["--router.k", "3"], "--router.k is no option of router cosine; it is one of "),
        (["--router", "topk", "--router.temperature=1"], "--router.temperature is no option of "),
        (["--budget.units", "-1"], "units=-1 must be at least 0"),
    ],
)
def test_wrong_names_are_user_errors(argv, message):
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert message in str(caught.value)


def test_parse_leaves_the_arguments_it_was_given_alone():
    argv = ["--preset", "large", "--router", "topk"]
    parse(PRESETS, argv, "prog", "")
    assert argv == ["--preset", "large", "--router", "topk"]


def test_help_lists_presets_parts_and_options(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help", "--router", "topk")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--preset {small,large} ready settings (small)" in text
    assert f"--router ROUTER {' '.join(registry.names('router'))} (topk)" in text
    assert "--router.k 2" in text and "all of them while fewer exist" not in text
    assert "--router.temperature" not in text
    with pytest.raises(SystemExit):
        read("--help-all", "--router", "topk")
    text = " ".join(capsys.readouterr().out.split())
    assert "--router.k INT" in text and "all of them while fewer exist" in text


def test_user_errors_become_one_line_and_an_exit_code(capsys):
    def main(argv: list[str]) -> None:
        raise UserError("the value is wrong")

    with pytest.raises(SystemExit) as caught:
        run_command(main, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the value is wrong\n"
    with pytest.raises(SystemExit) as caught:
        run_command(main, ["--debug"])
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.endswith("error: the value is wrong\n")
    assert text.startswith("Traceback")


# settings as values -------------------------------------------------------------------------------


def test_slots_are_found_in_classes_and_instances():
    assert slots(Settings) == slots(Settings()) == {"router": "router", "trigger": "trigger"}


def test_to_dict_is_plain_json():
    values = to_dict(Settings(runs_dir=Path("some") / "where", router=PRESETS["large"].router))
    assert values["router"] == {"part": "cosine", "temperature": 0.7}
    assert values["budget"] == {"mode": "constant", "units": 0, "start": "whole"}
    assert values["sizes"] == [1, 2] and values["runs_dir"] == str(Path("some") / "where")
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {f.name for f in dataclasses.fields(Settings)}


PLACES: dict[str, Any] = {
    "runs_dir": Path("elsewhere"),
    "name": "x",
    "resume": True,
    "debug": True,
    "note": "y",
}


@pytest.mark.parametrize("field", PLACES)
def test_where_a_run_is_kept_is_no_part_of_its_identity(field):
    changed = replace(Settings(), **{field: PLACES[field]})
    assert field not in identity(changed) and field in to_dict(changed)
    assert identity(changed) == identity(Settings()) and digest(changed) == digest(Settings())


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 6},
        {"sizes": (1, 2, 3)},
        {"budget": Budget(mode="per-growth")},
        {"router": registry.get("router", "cosine").Config(temperature=0.3)},
        {"router": registry.get("router", "softmax").Config()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_numbers_is(change):
    changed = replace(Settings(), **change)
    assert identity(changed) != identity(Settings()) and digest(changed) != digest(Settings())


def test_the_digest_names_all_seeds_of_a_setting():
    assert digest(Settings(seed=1)) == digest(Settings(seed=2))
    assert identity(Settings(seed=1)) != identity(Settings(seed=2))
    assert len(digest(Settings())) == 8 and int(digest(Settings()), 16) >= 0


def test_building_a_part_refuses_what_its_annotations_do():
    class Local:
        """A type that annotations cannot name outside this function."""

    @dataclass(frozen=True, kw_only=True)
    class Unresolved(PartConfig):
        steps: Local
        part = registry.get("trigger", "task")

    with pytest.raises(UserError, match="trigger gradient: memory=2.5 must be a whole number"):
        registry.get("trigger", "gradient").Config(memory=2.5).build()
    registry.get("trigger", "at").Config(steps=[3, 5]).build()  # a list, though it says tuple
    Unresolved(steps=Local()).build()


def test_parts_with_equal_options_have_different_digests():
    pruning, init = (registry.get("pruning", name).Config() for name in ("first", "random"))
    one, other = replace(Settings(), router=pruning), replace(Settings(), router=init)
    assert digest(one) != digest(other)


def test_difference_names_each_setting_that_changed():
    old = to_dict(PRESETS["small"])
    assert difference(old, old) == []
    new = to_dict(replace(PRESETS["large"], budget=Budget(units=3)))
    assert difference(old, new) == [
        "budget.units: 0 -> 3",
        "epochs: 5 -> 50",
        f"router.temperature: {old['router']['temperature']} -> 0.7",
    ]
    softmax = to_dict(replace(PRESETS["small"], router=registry.get("router", "topk").Config()))
    assert difference(old, softmax) == [
        "router.k: None -> 2",
        "router.part: cosine -> topk",
        f"router.temperature: {old['router']['temperature']} -> None",
    ]

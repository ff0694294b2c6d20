"""Every option of every command and part with values that it cannot have: one line, exit code 2.

The cases are made of the typed settings themselves, so that a new option is tested without a line
here. Most go to the check that each command line passes through; the others are whole commands.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe import registry
from dynmoe.commands import load
from dynmoe.errors import UserError
from dynmoe.lab.config import check_name, parse, refuse_unused, run_command, slots
from dynmoe.lab.study import without
from dynmoe.ranges import MOST, Range, Signed, check_options, check_settings

COMMANDS = ("cl", "rl", "tta", "dg")
STARTERS = ("sweep", "search", "study")
WHOLE: list[Any] = ["many", None, True, 1.5, -1, 10**13]
NUMBERS: list[Any] = ["fast", None, False, math.nan, math.inf, -math.inf, 1e39, -0.5]
"""What no whole number, and no number, may be."""


def wrong_values(hint: Any) -> list[Any]:
    """Values that a field of this type cannot have."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return [v for v in wrong_values(inner[0]) if v != -0.5]  # the one that is signed
    if origin is typing.Literal:
        return ["xyzzy", None, 7]
    if origin is tuple:
        return ["text", 3, *((v,) for v in wrong_values(inner[0]))]
    if origin in (types.UnionType, typing.Union):
        wrong = [wrong_values(one) for one in inner if one is not types.NoneType]
        return [v for v in wrong[0] if v is not None] if len(wrong) == 1 else []
    known = {int: WHOLE, float: NUMBERS, bool: ["maybe", 2, None], str: [5, None]}
    return known.get(hint, [])


def cases_of(config: type) -> Iterator[tuple[str, Any]]:
    """(field, wrong value) of a settings class."""
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        if name in {field.name for field in dataclasses.fields(config)}:
            yield from ((name, value) for value in wrong_values(hint))


def told(error: UserError, option: str, value: Any) -> bool:
    """Whether a message is one line that names the option, the value, and what is allowed."""
    text = str(error)
    shown = value[0] if isinstance(value, tuple) and value else value
    allowed = any(word in text for word in ("use ", "must be ", "neither "))
    return option in text.replace("-", "_") and str(shown) in text and allowed and "\n" not in text


def part_configs(kind: str) -> list[type]:
    return [registry.get(kind, name).Config for name in registry.names(kind)]


@pytest.mark.parametrize("kind", registry.PACKAGES)
def test_wrong_values_of_every_part(kind: str) -> None:
    for config in part_configs(kind):
        name = config.part.name  # type: ignore[attr-defined]
        options = {"steps": (5,)} if (kind, name) == ("trigger", "at") else {}
        check_options(name, config(**options))
        for option, value in cases_of(config):
            with pytest.raises(UserError) as caught:
                check_options(name, config(**options | {option: value}))
            assert told(caught.value, option, value), (name, option, value, str(caught.value))


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_values_of_every_setting(command: str) -> None:
    """Also through what commands, studies and programs call before any work."""
    module = load(command)
    experiment, presets = module.experiment(), module.presets()
    for preset in presets.values():
        check_settings(preset)
    base = next(iter(presets.values()))
    for name, value in cases_of(type(base)):
        with pytest.raises(UserError) as caught:
            experiment.check(dataclasses.replace(base, **{name: value}))
        assert told(caught.value, name, value), (name, value, str(caught.value))


def test_the_catalogue_is_large() -> None:
    configs = [config for kind in registry.PACKAGES for config in part_configs(kind)]
    configs += [type(next(iter(load(name).presets().values()))) for name in COMMANDS]
    assert sum(len(list(cases_of(config))) for config in configs) > 2500


# whole commands -----------------------------------------------------------------------------------


def failed(main: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that was refused says on stderr."""
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in err + out, (argv, err)
    return err


def out_of_range(config: Any, prefix: str = "--") -> list[list[str]]:
    """A command line for each number of these settings, the parts' that are chosen among them."""
    found, values = [], ("nan", "-0.5", "inf", "1e39")
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            found += out_of_range(value, f"{flag}.")
        elif isinstance(value, float) and flag != "--new-experts.logit":
            found.append([flag, values[len(found) % len(values)]])
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append([flag, ("-1", "9999999999999")[len(found) % 2]])
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_out_of_range_on_the_command_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cl has the parts of rl and more; of the common ones it does not read all again."""
    module = load(command)
    lines = out_of_range(next(iter(module.presets().values())))
    if command == "cl":
        lines = [line for line in lines if "." not in line[0]][::2] + lines[-3:]
    for argv in lines:
        err = failed(module.main, [*argv, "--runs-dir", str(tmp_path / "runs")], capsys)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        shown = {"-0.5": "-0.5", "-1": "-1", "1e39": "1e+39"}.get(argv[1], argv[1])
        # a part that checks itself as it is made comes first, and names it in its own way
        option = argv[0].rpartition(".")[2].lstrip("-")
        assert option in err.replace("_", "-") and shown in err, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_choices(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(command)
    for field, kind in slots(next(iter(module.presets().values()))).items():
        err = failed(module.main, [f"--{field.replace('_', '-')}", "xyzzy"], capsys)
        what = registry.CALLED.get(kind, kind)
        assert err.startswith(f"error: unknown {what} 'xyzzy'; known: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", ["--seed many", "--threads 1.5", "--resume maybe"])
def test_wrong_types_end_in_tyros_own_box(
    command: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, argv = load(command), words.split()
    err = failed(module.main, [*argv, "--runs-dir", str(tmp_path / "runs")], capsys)
    assert argv[0] in err or argv[1] in err
    assert not (tmp_path / "runs").exists()


MISSPELT = [
    ("cl", "--granularty 2", "--granularity"),
    ("cl", "--prest minute", "--preset"),
    ("rl", "--no-aneal-lr", "--no-anneal-lr"),
    ("cl", "-epochs 3", "--epochs"),
    ("rl", "--trigger every --trigger.step 5", "--trigger.steps"),
    ("tta", "--metod=tent", "--method"),
    ("dg", "--eval_evry 20", "--eval-every"),
    ("sweep", "cl --variant x", "--variants"),
    ("sweep", "cl --batch-size 8", None),
    ("search", "cl --trails 3", "--trials"),
    ("study", "granularity --job 3", "--jobs"),
    ("report", "--oot x", "--out"),
    ("export", "--quantise", None),
    ("list", "--markdwn", "--markdown"),
    ("sweep", "cl --no-dry-run", "--dry-run"),
    ("cl", "--budget constant", "--budget.mode"),
]


@pytest.mark.parametrize(("command", "words", "nearest"), MISSPELT)
def test_misspelt_options(
    command: str, words: str, nearest: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    err = failed(load(command).main, words.split(), capsys)
    wrong = next(w for w in words.split()[::-1] if w.startswith("-"))
    wrong = wrong.split("=")[0].replace("_", "-")
    hint = f"did you mean {nearest}? " if nearest else ""
    more = "; options of the runs follow a lone --" if command in STARTERS else ""
    assert err == f"error: unknown option {wrong}; {hint}--help lists all options{more}\n"


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("export", "runs/x --out y", "--out is given without its name"),
        ("report", "--runs runs/cl", "--runs is given without its name"),
        ("cl", "--preset smoke -- --seed 3", "--seed stands behind a lone --"),
    ],
)
def test_options_in_the_wrong_place(
    command: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = failed(load(command).main, words.split(), capsys)
    assert err.startswith(f"error: {message}") and err.count("\n") == 1, err


def test_a_study_s_own_part_is_replaced_however_the_flag_is_written() -> None:
    own = ["--protocol", "blurred", "--protocol.width", "3", "--no-anneal-lr", "--lr", "1"]
    for flags in (["--protocol", "class"], ["--protocol=class"]):
        assert without(own, flags) == ["--no-anneal-lr", "--lr", "1"]
    assert without(own, ["--anneal_lr"]) == [*own[:4], *own[5:]]


@pytest.mark.parametrize("words", ["granularity 2", "--seed 3 4"])
def test_words_that_are_no_options(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = failed(load("cl").main, words.split(), capsys)
    assert err.startswith("error: unexpected '") and err.count("\n") == 1, err


@pytest.mark.parametrize("command", COMMANDS)
def test_options_without_effect(command: str) -> None:
    """All that the settings of all presets say of themselves, and what is below such an option."""
    for preset in load(command).presets().values():
        for name in preset.unused():
            flag = f"--{name.replace('_', '-')}"
            for word in (flag, f"{flag}=3", f"{flag}.option"):
                with pytest.raises(UserError, match=r"^--\S+ has no effect: .*--allow-unused"):
                    refuse_unused(preset, [word, "3"])


OTHERS = [
    ("study", "nothing", "unknown study 'nothing'"),
    ("study", "granularity --seeds -1", "--seeds -1 is too small"),
    ("study", "granularity --jobs 0", "--jobs 0 is too small"),
    ("study", "granularity --jobs -2", "--jobs -2 is too small"),
    ("study", "granularity --cpus 2", "--cpus has no effect with --launcher local"),
    ("study", "granularity --streams nowhere", "nowhere"),
    ("sweep", "cl --seeds many", "--seeds many is no number of seeds"),
    ("sweep", "cl --seeds 0", "--seeds 0 is too small"),
    ("sweep", "cl --seeds -3..2", "--seeds -3..2 is too small"),
    ("sweep", "cl --retries -1", "--retries -1 is too small"),
    ("sweep", "cl --jobs 0", "--jobs 0 is too small"),
    ("sweep", "cl --name ../out", "--name '../out' must name a folder below --runs-dir"),
    ("sweep", "cl --variants g2", "variant 'g2' must read"),
    ("sweep", "cl --variants _g2:", "variant '_g2': legends leave out what begins with _"),
    ("sweep", "cl --grid lr", "setting 'lr' must read"),
    ("sweep", "cl --grid lr:", "needs one or more values"),
    ("sweep", "tta", "nothing to sweep"),
    ("search", "cl --trials 0 --space lr:1,2", "--trials 0 is too small"),
    ("search", "cl --trials -1", "--trials -1 is too small"),
    ("search", "cl --search-seeds 0", "--search-seeds 0 is too small"),
    ("search", "cl --retries -1", "--retries -1 is too small"),
    ("search", "cl --name /else/out", "--name '/else/out' must name a folder below --runs-dir"),
    ("search", "cl", "--space"),
    ("search", "cl --space lr", "lr"),
    ("report", "", "name the folders of runs"),
    ("report", "nowhere", "nowhere"),
    ("list", "routers", "unknown kind 'routers'; known: "),
    ("cl", "--name ../x", "--name '../x' must name a folder below --runs-dir"),
    ("dg", "--name a/../../x", "must name a folder below --runs-dir"),
    ("tta", "--compare noadapt tent:lr=NaN", "tent: lr=nan is no finite number"),
    ("tta", "--compare noadapt tent:lr=-1", "tent: lr=-1 is too small; use 0 or more"),
    ("cl", "--intervention redo --intervention.period 0", "period"),
    ("cl", "--trigger drift --trigger.warmup 0", "warmup=0"),
    ("cl", "--protocol warmstart --protocol.share 0", "share 0"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "message"), OTHERS)
def test_other_commands_and_what_parts_say(
    command: str,
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    err = failed(load(command).main, words.split(), capsys)
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not list(tmp_path.iterdir())


# the check itself ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A setting of each kind of range."""

    plain: float = 1.0
    signed: Signed = 0.0
    share: Annotated[float, Range(0, 1)] = 0.5
    count: int | None = None


def passes(settings: Sample) -> bool:
    """Whether the check lets them through."""
    try:
        check_settings(settings)
    except UserError:
        return False
    return True


@given(value=st.floats())
def test_numbers_pass_exactly_where_they_are_in_range(value: float) -> None:
    inside = {
        "plain": 0 <= value <= MOST, "signed": abs(value) <= MOST, "share": 0 <= value <= 1,
    }  # fmt: skip
    for name, fits in inside.items():
        assert fits == passes(Sample(**{name: value})), name


@given(value=st.integers())
def test_whole_numbers_do_too(value: int) -> None:
    assert passes(Sample(count=value)) == (0 <= value <= 10**12)


@pytest.mark.parametrize("name", ["..", "../x", "a/../../b", "/elsewhere/x", "", "."])
def test_names_that_leave_the_folder_of_runs(name: str) -> None:
    with pytest.raises(UserError, match="must name a folder below --runs-dir"):
        check_name(name)


def test_names_below_it() -> None:
    for name in (None, "x", "sweep/g2", "..x", "a.b"):
        check_name(name)
    assert parse(load("cl").presets(), ["--name", "a/b"], "", "")[1].name == "a/b"


def test_memory_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        torch.empty(2**50)

    with pytest.raises(SystemExit) as stopped:
        run_command(main, [])
    err = capsys.readouterr().err
    assert stopped.value.code == 4 and err.count("\n") == 1
    assert err.startswith("error: out of memory: ") and "--batch-size" in err


def test_other_errors_of_torch_keep_their_traceback() -> None:
    def main(argv: list[str]) -> None:
        torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(RuntimeError):
        run_command(main, [])

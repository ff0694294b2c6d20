"""The commands as programs: the list, what is missing, and what hides our packages."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dynmoe import __main__ as program
from dynmoe import commands
from dynmoe.commands import COMMANDS, LAB, dispatch, need
from dynmoe.errors import UserError
from dynmoe.lab.config import run_command

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"avalanche": "avalanche-lib"}
"""Package as it is imported -> as it is installed, where the names differ."""


def _run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A program of its own, with our packages on the path behind the current folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )


def test_the_list_names_every_command_and_its_cost(capsys):
    dispatch([])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "dynmoe cl --preset minute" in text
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=\w)", text)]
    for name, command in COMMANDS.items():
        assert any(re.match(f"{name} .*{re.escape(f'({command.cost})')}", e) for e in entries), name
    files = [*(ROOT / "dynmoe").glob("*.py"), *(ROOT / "dynmoe").glob("*/__main__.py")]
    runnable = {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in files
        if 'if __name__ == "__main__"' in path.read_text()
    }
    assert runnable - {"dynmoe"} == set(COMMANDS)
    assert program.main is commands.main


def test_python_m_dynmoe_is_the_program():
    assert _run("-m", "dynmoe").stdout.startswith("usage: dynmoe COMMAND")
    ours, module = (_run("-m", *argv, "router") for argv in (["dynmoe", "list"], ["dynmoe.list"]))
    assert ours.stdout == module.stdout and "router topk" in ours.stdout
    wrong = _run("-m", "dynmoe", "tts")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown command 'tts'") and "'tta'?" in wrong.stderr


def test_a_reader_that_stops_early_sees_no_traceback():
    command = f"{sys.executable} -m dynmoe.list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("router") and done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_found(name: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        dispatch([name, "--help"])
    assert stopped.value.code in (0, None)
    assert f"dynmoe.{name}" in capsys.readouterr().out


def _extras() -> dict[str, list[str]]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]


def _installs(extra: str) -> set[str]:
    """Distributions that an extra brings, by way of the extras that it includes, too."""
    out = set()
    for line in _extras()[extra]:
        included = re.fullmatch(r"dynmoe\[(.*)\]", line)
        if included:
            out |= {name for other in included[1].split(",") for name in _installs(other)}
        else:
            out.add(re.split(r"[><=]", line)[0])
    return out


@pytest.mark.parametrize("name", COMMANDS)
def test_an_extra_brings_what_its_command_needs(name: str):
    command = COMMANDS[name]
    needed = {DISTRIBUTIONS.get(package, package) for package in command.needs}
    assert needed <= _installs(command.extra) <= _installs("all") <= _installs("test")


@pytest.mark.parametrize(
    ("name", "package"), [(n, p) for n, c in COMMANDS.items() for p in c.needs if p not in LAB[1:]]
)
def test_what_is_not_installed_is_one_line(name: str, package: str, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        run_command(dispatch, [name])
    assert stopped.value.code == 2
    line = f"error: {name} needs {package}, not installed here; "
    line += f"run: pip install 'dynmoe[{COMMANDS[name].extra}]'\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", ["cl", "list", "tta"])
def test_so_it_is_as_a_module(name: str):
    code = (
        "import runpy, sys\n"
        "sys.modules['tyro'] = None\n"
        f"runpy.run_module('dynmoe.{name}', run_name='__main__', alter_sys=True)"
    )
    done = _run("-c", code)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} needs tyro, ") and done.stderr.count("\n") == 1


def test_need_names_all_that_is_missing():
    with pytest.raises(UserError, match=r"video needs nowhere_a, nowhere_b, .*'dynmoe\[rl\]'"):
        need("video", "rl", ["torch", "nowhere_a", "nowhere_b"])
    need("video", "rl", ["torch"])


@pytest.mark.parametrize(
    ("name", "package", "file"),
    [
        ("cl", "cl_benchmarks", "__init__.py"),
        ("rl", "envs", "__init__.py"),
        ("rl", "agents", None),
        ("list", "agents", "other.py"),
    ],
)
def test_a_folder_that_hides_ours_is_one_line(
    name: str, package: str, file: str | None, tmp_path: Path
):
    """As `python -m dynmoe.NAME` and as `python -m dynmoe NAME`; a single file hides it as well."""
    if file is None:
        foreign = tmp_path / f"{package}.py"
        foreign.touch()
    else:
        foreign = tmp_path / package
        foreign.mkdir()
        (foreign / "__init__.py").touch()
        (foreign / file).touch()
    for argv in ([f"dynmoe.{name}"], ["dynmoe", name]):
        done = _run("-m", *argv, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: {foreign} hides dynmoe's own package {package}; ")
        assert f"`dynmoe {name} ...`" in done.stderr and done.stderr.count("\n") == 1


def test_the_console_script_does_not_look_into_the_current_folder(tmp_path: Path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    script = tmp_path / "bin" / "dynmoe"
    script.parent.mkdir()
    script.write_text("from dynmoe.commands import main\nmain()\n")  # as pip writes it
    done = _run(str(script), "list", "agent", cwd=tmp_path)
    assert done.returncode == 0 and "agent moe" in done.stdout
    with open(ROOT / "pyproject.toml", "rb") as file:
        module, function = tomllib.load(file)["project"]["scripts"]["dynmoe"].split(":")
    assert getattr(importlib.import_module(module), function) is commands.main

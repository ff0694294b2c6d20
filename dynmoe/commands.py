"""The commands: what each does, what it costs, what it needs; `dynmoe` and `python -m dynmoe`.

dynmoe                      lists the commands
dynmoe cl --granularity 2   is python -m dynmoe.cl --granularity 2
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError, unknown
from dynmoe.lab import torchrun
from dynmoe.lab.config import run_command

LAB = ("tyro", "rich", "scipy", "matplotlib", "tensorboard")
"""Packages that every run needs: the extra `lab`, which all others include."""
SHARED = ("cl", "rl", "dg")
"""Commands whose runs several processes can share, see `dynmoe.lab.processes`."""
NEW = (
    "new here? dynmoe doctor says what is missing; dynmoe cl --preset minute shows\n"
    "what growth does, in about a minute"
)
TOP = ("cl_benchmarks", "agents", "envs")
"""Our packages whose names a folder of the user's may have, too."""


@dataclass(frozen=True)
class Command:
    """One command: `dynmoe.NAME`, a module (or a package with a `__main__`) that has `main(argv)`.

    `needs` names the packages without which it cannot start, as they are imported; what single
    parts need beyond that, they say themselves.
    """

    summary: str
    cost: str
    extra: str
    needs: tuple[str, ...]
    ours: tuple[str, ...]


COMMANDS = {
    "cl": Command(
        "continual learning: a growing network on a stream of tasks, beside dense ones",
        "3 minutes on 1 core",
        "cl",
        (*LAB, "avalanche"),
        ("cl_benchmarks",),
    ),
    "rl": Command(
        "reinforcement learning: a PPO agent whose experts grow, on the pixels of Craftax",
        "4 minutes on 1 core, the first time 5",
        "rl",
        (*LAB, "gymnasium"),
        ("agents", "envs"),
    ),
    "tta": Command(
        "test-time adaptation: methods on streams of shifted images",
        "10 minutes on 1 core",
        "tta",
        (*LAB, "timm"),
        ("cl_benchmarks",),
    ),
    "dg": Command(
        "domain generalisation: methods on domains, one left out at a time",
        "minutes on 2 cores",
        "dg",
        (*LAB, "timm"),
        ("cl_benchmarks", "envs"),
    ),
    "sweep": Command(
        "a command over variants, a grid of settings and seeds, compared with intervals",
        "that of its runs",
        "lab",
        LAB,
        TOP,
    ),
    "search": Command(
        "the best settings of a command, found by trials and measured on other seeds",
        "that of its runs",
        "search",
        (*LAB, "optuna"),
        TOP,
    ),
    "study": Command(
        "a question, the runs that answer it, and the verdict",
        "that of its runs",
        "lab",
        LAB,
        TOP,
    ),
    "report": Command(
        "finished runs of any command as one page, with tables and figures for a paper",
        "seconds",
        "lab",
        (*LAB, "jinja2"),
        TOP,
    ),
    "export": Command(
        "a trained network as files with a model card, or on a hub; two lines load it",
        "seconds",
        "lab",
        (*LAB, "safetensors"),
        TOP,
    ),
    "list": Command(
        "the parts that can be chosen by name, with their sources and options",
        "seconds",
        "lab",
        ("tyro", "rich"),
        TOP,
    ),
    "doctor": Command(
        "what of this machine can be used, what is missing, and what to do about it",
        "seconds",
        "lab",
        (),
        (),
    ),
}


def begin(name: str, module: str) -> None:
    """Check that a command can run here, before it imports what may be missing.

    Args:
        name: of the command.
        module: the caller's `__name__`. Where it is run as a program, a fault ends the process with
            one line and exit code 2.

    Raises:
        UserError: a package is not installed, or a folder of the same name hides one of ours.
    """
    if module == "__main__":
        run_command(lambda _: _check_start(name))
    else:
        check(name)


def _check_start(name: str) -> None:
    """Check a command that is about to run, perhaps by torchrun."""
    check(name)
    if name not in SHARED:
        torchrun.refuse(name, f"start it as: python -m dynmoe.{name}")


def check(name: str) -> None:
    """Refuse what would end in a failing import.

    Raises:
        UserError: as in `begin`.
    """
    command = COMMANDS[name]
    need(name, command.extra, command.needs)
    root = Path(__file__).resolve().parents[1]
    for package in command.ours:
        where = place_of(package)
        if where is not None and where != root / package:
            raise UserError(
                f"{where} hides dynmoe's own package {package}; run `dynmoe {name} ...`, which "
                "does not look into the current folder, start from another folder, or rename it"
            )


def need(what: str, extra: str, packages: Iterable[str]) -> None:
    """Refuse to go on without these packages, named as they are imported.

    Raises:
        UserError: some are not installed; the line names them and the extra that brings them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(
            f"{what} needs {', '.join(missing)}, not installed here; "
            f"run: pip install 'dynmoe[{extra}]'"
        )


def listing() -> str:
    """The commands, each with what it does and the cost of its default preset; 80 columns."""
    width = max(map(len, COMMANDS))
    lines = ["usage: dynmoe COMMAND [options]; dynmoe COMMAND --help explains them", ""]
    for name, command in COMMANDS.items():
        text = f"  {name:{width}}  {command.summary} ({command.cost})"
        lines += textwrap.wrap(text, 80, subsequent_indent=" " * (width + 4))
    return "\n".join([*lines, "", NEW])


def dispatch(argv: list[str]) -> None:
    """Run the command that is named first, or list all.

    Raises:
        UserError: there is no such command, or it cannot run here.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(listing())
        return
    name = argv[0]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    _check_start(name)
    load(name).main(argv[1:])


def load(name: str) -> Any:
    """The module of a command. Of cl, rl, tta and dg it has `presets()` and `experiment()`.

    Raises:
        UserError: the command cannot run here.
    """
    check(name)
    package = Path(__file__).with_name(name).is_dir()
    return import_module(f"dynmoe.{name}.__main__" if package else f"dynmoe.{name}")


def main() -> None:
    """The console script `dynmoe`."""
    run_command(dispatch)


def place_of(package: str) -> Path | None:
    """The folder or file that an import of the package would take; None where there is none."""
    spec = find_spec(package)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    place = folders[0] if folders else spec.origin
    return None if place is None else Path(place).resolve()

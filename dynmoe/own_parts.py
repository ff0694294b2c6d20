"""Parts from outside this repository: entry points of installed packages, and single files.

A package declares modules or part classes under the entry-point group `dynmoe.parts`; python files
are named in the environment variable DYNMOE_PARTS, separated as in PATH. Importing them registers
their parts. docs/own_parts.md shows both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from dynmoe.errors import UserError

GROUP = "dynmoe.parts"
"""Entry-point group of packages with parts."""
VARIABLE = "DYNMOE_PARTS"
"""Environment variable with the paths of files with parts; sub-processes inherit it."""

_loaded: set[str] = set()


def load_own_parts() -> None:
    """Import every declared module and file that was not imported yet.

    Raises:
        UserError: one cannot be imported; the line names the package or file, and the reason.
    """
    for what, load in _declared():
        if what in _loaded:
            continue
        _loaded.add(what)  # first, since what is imported may itself ask for names
        try:
            load()
        except Exception as error:
            _loaded.discard(what)
            raise UserError(f"{what} cannot be loaded: {_one_line(error)}") from error


def describe() -> list[str]:
    """What is declared, for the record of a run: packages with versions, files with SHA-256."""
    packages = [f"{e.value} of {e.dist.name} {e.dist.version}" for e in _entries() if e.dist]
    files = [
        f"{path.resolve()} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in _files()
    ]
    return packages + files


def _declared() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What messages call each module or file, and how to import it."""
    for entry in _entries():
        package = entry.dist.name if entry.dist else "unknown"
        what = f"{entry.value}, declared as {GROUP} {entry.name!r} by the package {package},"
        yield what, functools.partial(_load_entry, entry)
    for path in _files():
        yield f"{path}, named in {VARIABLE},", functools.partial(_import_file, path)


@functools.cache
def _entries() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _files() -> list[Path]:
    return [Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _load_entry(entry: EntryPoint) -> None:
    if not isinstance(entry.load(), type | ModuleType):
        raise UserError("it is neither a module nor a class")


def _import_file(path: Path) -> None:
    """Import a file under a module name made of its own: `my_router.py` as `own_my_router`.

    The name depends on nothing else, so it is the same in every process and on every machine.

    Raises:
        UserError: no such file, no python file, or another file of that name was imported before.
    """
    if not path.is_file():
        raise UserError("there is no such file")
    if path.suffix != ".py":
        raise UserError("it must be a python file (.py)")
    name = "own_" + re.sub(r"\W", "_", path.stem)
    there = sys.modules.get(name)
    if there is not None:
        if Path(str(there.__file__)).samefile(path):
            return
        raise UserError(f"{there.__file__} has the same name; rename one of them")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError("python has no way to import it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"

"""Named parts (routers, pruning criteria, data sets, ...): what a command can choose by name.

A part is a class that names itself, in a module that its kind's package imports (see `PACKAGES`):

    class Cosine(Router, name="cosine"):
        '''One line that `--help` shows. Source.'''

        @dataclass(frozen=True, kw_only=True)
        class Config(Router.Config):
            temperature: float = 0.2
            '''divides the cosine similarities'''

Then the command line offers `--router cosine --router.temperature 0.5`, and the tests that run over
all registered names pick it up. Parts of your own need not live here: a package declares modules
or part classes under the entry-point group `dynmoe.parts`, and python files are named in the
environment variable DYNMOE_PARTS, separated as in PATH; docs/own_parts.md shows both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from dynmoe.errors import UserError, unknown
from dynmoe.ranges import check_options

PACKAGES = {
    "router": "dynmoe.moe.routers",
    "bank": "dynmoe.moe.experts",
    "loss": "dynmoe.moe.losses",
    "trigger": "dynmoe.growth.triggers",
    "pruning": "dynmoe.growth.pruning",
    "init": "dynmoe.growth.initialisation",
    "metric": "dynmoe.plasticity.metrics",
    "network": "cl_benchmarks.trunks",
    "tta": "dynmoe.tta.methods",
    "encoder": "agents.encoders",
    "agent": "agents.methods",
    "dataset": "cl_benchmarks.datasets",
    "protocol": "cl_benchmarks.protocols",
    "method": "cl_benchmarks.methods",
    "intervention": "cl_benchmarks.interventions",
    "domains": "cl_benchmarks.domains",
    "dg": "dynmoe.dg.methods",
    "study": "dynmoe.studies",
}
"""Kind of part -> the module or package that imports all parts of it, a line each."""

CALLED = {"dg": "method of dg", "tta": "method of tta", "agent": "method of rl"}
"""Kinds that users know by another name."""
GROUP = "dynmoe.parts"
"""Entry-point group of packages with parts."""
VARIABLE = "DYNMOE_PARTS"
"""Environment variable with the paths of files with parts; sub-processes inherit it."""

_loaded: set[str] = set()

_PARTS: dict[str, dict[str, type[Part]]] = {kind: {} for kind in PACKAGES}


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Options of one part. Subclassed inside each part as `Config`."""

    part: ClassVar[type[Part]]

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Make the part: `part(config, *args, **kwargs)`.

        Raises:
            UserError: the part lacks a method of its kind, its `__init__` takes other arguments, or
                an option has a value of another type than its annotation, or out of range.
        """
        check_methods(self.part)
        takes = inspect.signature(self.part)
        try:
            takes.bind(self, *args, **kwargs)
        except TypeError:
            given = ["its Config", *(type(arg).__name__ for arg in args), *kwargs]
            raise UserError(
                f"{self.part.kind} {self.part.name!r}: its __init__ takes {takes} beside self and "
                f"is given {', '.join(given)}; define an __init__ that takes these"
            ) from None
        made = self.part(self, *args, **kwargs)  # type: ignore[call-arg]
        if hasattr(self.part, "name"):  # else it is another part's, whose options are checked there
            check_options(f"{self.part.kind} {self.part.name}", self)  # its own words came first
        return made


class NameTakenError(UserError, TypeError):
    """Two classes of a kind take the same name."""


class Part:
    """Base of everything that is chosen by name.

    `kind`, `name` and `source` (the paper and place that a part is from, or "ours") are given where
    a class is defined.

    Raises:
        NameTakenError: when two classes of a kind take the same name.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    source: ClassVar[str]
    Config: ClassVar[type[PartConfig]] = PartConfig

    def __init_subclass__(
        cls,
        *,
        kind: str | None = None,
        name: str | None = None,
        source: str = "ours",
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
        if name is None:
            return
        if "Config" not in cls.__dict__:  # a part without options still needs a Config of its own
            where = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            cls.Config = dataclass(frozen=True, kw_only=True)(type("Config", (cls.Config,), where))
        other = _PARTS[cls.kind].get(name)
        if other is not None and _place(other) != _place(cls):  # its file may be imported again
            both = [f"{c.__module__}.{c.__qualname__}" for c in (other, cls)]
            raise NameTakenError(
                f"{cls.kind} {name!r} is defined by {both[0]} and again by {both[1]}; rename one"
            )
        cls.name, cls.source = name, source
        cls.Config.part = cls
        _PARTS[cls.kind][name] = cls


def _place(part: type[Part]) -> tuple[str, str]:
    """The file that a class stands in (or its module, in a notebook), and its name there."""
    file = getattr(sys.modules.get(part.__module__), "__file__", None)
    return os.path.realpath(file) if file else part.__module__, part.__qualname__


def check_methods(part: type[Part]) -> None:
    """Refuse a part that leaves a method of its kind undefined.

    Raises:
        UserError: names the methods.
    """
    lacking = [n for n in dir(part) if getattr(getattr(part, n), "__isabstractmethod__", False)]
    if lacking:
        raise UserError(
            f"{part.kind} {part.name!r} must define {', '.join(lacking)}, as every {part.kind} "
            f"does; add it to the class {part.__qualname__}"
        )


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted.

    The first call imports the kind's package, and the parts of your own.

    Raises:
        UserError: a part of your own cannot be imported.
    """
    importlib.import_module(PACKAGES[kind])
    load_own_parts()
    return sorted(_PARTS[kind])


def get(kind: str, name: str) -> type[Any]:
    """The part class of that kind and name.

    Raises:
        UserError: unknown name; the message lists the known ones and suggests the nearest.
    """
    known = names(kind)
    if name in known:
        return _PARTS[kind][name]
    own = f"If it is your own, name its file in {VARIABLE}."
    raise unknown(CALLED.get(kind, kind), name, known, own)


def make_config(kind: str, name: str, options: Mapping[str, Any] | None = None) -> PartConfig:
    """The Config of the part of that kind and name, with these options.

    Raises:
        UserError: unknown name or option; the message lists the known ones.
    """
    config: type[PartConfig] = get(kind, name).Config
    known, given = [f.name for f in fields(config)], dict(options or {})
    for option in given:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
    return config(**given)


def summary(kind: str, name: str) -> str:
    """First line of a part's docstring."""
    return (get(kind, name).__doc__ or "").strip().split("\n")[0]


def slot(kind: str, name: str) -> Any:
    """A dataclass field that holds the Config of a part of `kind`; `name` is the default part."""
    return field(default_factory=lambda: get(kind, name).Config(), metadata={"kind": kind})


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


def describe_own_parts() -> list[str]:
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

    The name depends on nothing else, so it is the same in every process and on every machine. A
    file that a script has imported already, or that is the script, is not imported again.

    Raises:
        UserError: no such file, no python file, or another file of that name was imported before.
    """
    if not path.is_file():
        raise UserError("there is no such file")
    if path.suffix != ".py":
        raise UserError("it must be a python file (.py)")
    if _is_imported(path):
        return
    name = "own_" + re.sub(r"\W", "_", path.stem)
    there = sys.modules.get(name)
    if there is not None:
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


def _is_imported(path: Path) -> bool:
    """Whether a module of this process comes from the file, whatever its name."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    named = [Path(file) for file in files if file and os.path.basename(file) == path.name]
    return any(file.resolve() == path.resolve() for file in named)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"

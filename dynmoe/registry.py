"""Named parts (routers, pruning criteria, data sets, ...): what a command can choose by name.

A part is a class that names itself, in a module that its kind's package imports (see `PACKAGES`):

    class Cosine(Router, name="cosine"):
        '''One line that `--help` shows. Source.'''

        @dataclass(frozen=True, kw_only=True)
        class Config(Router.Config):
            temperature: float = 0.2
            '''divides the cosine similarities'''

Then the command line offers `--router cosine --router.temperature 0.5`, and the tests that run over
all registered names pick it up. Parts of your own need not live here: see docs/own_parts.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from dynmoe.errors import UserError, unknown
from dynmoe.own_parts import VARIABLE, load_own_parts

PACKAGES = {
    "router": "dynmoe.moe.routers",
    "bank": "dynmoe.moe.experts",
    "loss": "dynmoe.moe.losses",
    "trigger": "dynmoe.growth.triggers",
    "pruning": "dynmoe.growth.pruning",
    "init": "dynmoe.growth.initialisation",
    "metric": "dynmoe.plasticity.metrics",
    "network": "cl_benchmarks.networks",
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

_PARTS: dict[str, dict[str, type[Part]]] = {kind: {} for kind in PACKAGES}


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Options of one part. Subclassed inside each part as `Config`."""

    part: ClassVar[type[Part]]

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Make the part: `part(config, *args, **kwargs)`."""
        return self.part(self, *args, **kwargs)  # type: ignore[call-arg]


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
        same = (cls.__module__, cls.__qualname__)  # the module may be imported again
        if other is not None and (other.__module__, other.__qualname__) != same:
            both = [f"{c.__module__}.{c.__qualname__}" for c in (other, cls)]
            raise NameTakenError(
                f"{cls.kind} {name!r} is defined by {both[0]} and again by {both[1]}; rename one"
            )
        cls.name, cls.source = name, source
        cls.Config.part = cls
        _PARTS[cls.kind][name] = cls


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
    raise unknown(kind, name, known, f"If it is your own, name its file in {VARIABLE}.")


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

"""`python -m dynmoe.list`: every part that can be chosen by name.

The catalogue of the docs is written by `python -m dynmoe.list --markdown > docs/catalogue.md`.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dynmoe import registry
from dynmoe.commands import begin
from dynmoe.errors import unknown
from dynmoe.lab.config import run_command
from dynmoe.lab.markdown import cell
from dynmoe.lab.options import read_options

begin("list", __name__)  # before imports that may fail

import tyro  # noqa: E402

DESCRIPTION = """List the parts that can be chosen by name, such as the routers of `--router`: what
they are, where they are from (the paper, or "ours") and their options. Parts of your own are among
them (docs/own_parts.md)."""
KIND_HELP = f"only this kind; there are {', '.join(registry.PACKAGES)}"
HEADER = """# Catalogue of parts

Written by `python -m dynmoe.list --markdown > docs/catalogue.md`; do not edit it. Options are given
as on the command line, with their defaults, such as `--router topk --router.k 2`; `--help-all`
explains those of chosen parts. [core.md](core.md) says what each kind is for,
[own_parts.md](own_parts.md) how to add parts.
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to list."""

    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[KIND]", help=KIND_HELP)] = ""
    """only this kind of part"""
    markdown: bool = False
    """tables in Markdown of the parts that come with dynmoe"""
    debug: bool = False
    """show the traceback of an error"""


def main(argv: list[str]) -> None:
    """Print the parts of one kind or of all.

    Raises:
        UserError: there is no such kind.
    """
    config = read_options(Config, argv, "python -m dynmoe.list", DESCRIPTION)
    if config.kind and config.kind not in registry.PACKAGES:
        raise unknown("kind", config.kind, registry.PACKAGES)
    kinds = [config.kind] if config.kind else list(registry.PACKAGES)
    if config.markdown:
        print(catalogue(kinds), end="")
    else:
        show(kinds)


def show(kinds: Iterable[str]) -> None:
    """Print the parts of these kinds; lines are wrapped on a terminal only."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    width = console.width if console.is_terminal else sys.maxsize

    def line(text: str, indent: int, style: str = "") -> None:
        space = " " * indent
        wrapped = textwrap.fill(text, width, initial_indent=space, subsequent_indent=space)
        console.print(Text(wrapped, style=style), soft_wrap=True)

    for kind in kinds:
        known = registry.names(kind)
        line(f"{kind} ({_folder(kind)})", 0, "bold magenta")
        for name in known:
            part = registry.get(kind, name)
            line(f"{kind} {name}", 2, "bold cyan")
            line(registry.summary(kind, name), 6)
            line(f"source: {part.source}", 6, "dim")
            if chosen := options(part.Config):
                line(f"options: {', '.join(chosen)}", 6)
            if not _comes_with_dynmoe(part):
                line(f"defined in: {sys.modules[part.__module__].__file__}", 6, "green")


def catalogue(kinds: Iterable[str]) -> str:
    """One Markdown table per kind, of the parts that come with dynmoe."""
    lines = [HEADER]
    for kind in kinds:
        lines += [f"## {kind}", "", f"`{_folder(kind)}`", ""]
        lines += ["| name | what it is | source | options |", "|---|---|---|---|"]
        for name in registry.names(kind):
            part = registry.get(kind, name)
            if _comes_with_dynmoe(part):
                chosen = "; ".join(f"`{option}`" for option in options(part.Config))
                cells = [f"`{name}`", registry.summary(kind, name), part.source, chosen]
                lines.append(f"| {' | '.join(map(cell, cells))} |")
        lines.append("")
    return "\n".join(lines)


def options(config: type[registry.PartConfig]) -> list[str]:
    """`name=default` for each option of a part; other values follow where they are fixed."""
    hints, out = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        text = field.name.replace("_", "-")
        if field.default_factory is not dataclasses.MISSING:
            text += f"={_value(field.default_factory())}"
        elif field.default is not dataclasses.MISSING:
            text += f"={_value(field.default)}"
        others = [_value(v) for v in _literals(hints[field.name]) if v != field.default]
        out.append(f"{text} (or {', '.join(others)})" if others else text)
    return out


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _value(value: Any) -> str:
    """A value as one types it on a command line."""
    if isinstance(value, tuple):
        return " ".join(_value(v) for v in value) or "()"
    return (
        str(value) if isinstance(value, Path) or (isinstance(value, str) and value) else repr(value)
    )


def _folder(kind: str) -> str:
    """The folder or file that holds the kind's parts."""
    place = registry.PACKAGES[kind].replace(".", "/")
    return place if (Path(registry.__file__).parents[1] / place).is_dir() else f"{place}.py"


def _comes_with_dynmoe(part: type[registry.Part]) -> bool:
    return part.__module__.split(".")[0] in ("dynmoe", "cl_benchmarks", "agents")


if __name__ == "__main__":
    run_command(main)

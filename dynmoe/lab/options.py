"""A command line read by tyro into a settings dataclass; what is no option is told in one line."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from dynmoe.errors import UserError

C = TypeVar("C")

OF_RUNS = "; options of the runs follow a lone --"
"""What commands that start runs add where a word is no option of theirs."""


def read_options(
    of: type[C], args: list[str], prog: str, description: str | None, default: C | None = None,
    more: str = "",
) -> C:  # fmt: skip
    """The settings of class `of` that a command line gives, read by tyro.

    Args:
        default: settings to begin with, whose parts are chosen already.
        more: what to add where a word is no option.

    Raises:
        UserError: a word is no option; the nearest one is suggested.
    """
    import tyro

    way = tyro.conf.FlagCreatePairsOff if default is None else tyro.conf.AvoidSubcommands
    given: dict[str, Any] = {} if default is None else {"default": default}
    parsed, rest = tyro.cli(
        of, args=args, prog=prog, description=description, config=(way,),
        return_unknown_args=True, **given,
    )  # fmt: skip
    if rest:
        raise UserError(_no_option(rest, of, default) + more)
    return parsed


def _no_option(rest: list[str], of: type, default: Any) -> str:
    """What to say of words of a command line that are no options of these settings."""
    from tyro.conf import Positional

    wrong = [word.split("=")[0].replace("_", "-") for word in rest if word.startswith("-")]
    if not wrong:
        return f"unexpected {rest[0]!r}; options begin with --, and --help lists them"
    hints = typing.get_type_hints(of, include_extras=True)
    bare = {name for name, h in hints.items() if Positional in getattr(h, "__metadata__", ())}
    if wrong[0].removeprefix("--") in bare:
        return f"{wrong[0]} is given without its name: its value alone, in its place (see --help)"
    known = ["--preset", *_flags(default or of)]
    if wrong[0] in known:
        return f"{wrong[0]} stands behind a lone --, where no option is read; leave the -- out"
    near = difflib.get_close_matches(wrong[0], [k for k in known if k[2:] not in bare], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown option {wrong[0]}; {hint}--help lists all options"


def _flags(config: Any, prefix: str = "--") -> Iterator[str]:
    """All options of a settings class or instance, those of its parts as --PART.OPTION."""
    for field in dataclasses.fields(config):
        name = field.name.replace("_", "-")
        value = getattr(config, field.name, None)
        if not dataclasses.is_dataclass(value) or "kind" in field.metadata:
            yield f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool) and not isinstance(config, type):
            yield f"{prefix}no-{name}"

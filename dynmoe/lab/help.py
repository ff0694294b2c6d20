"""`--help` of a command, written from its settings: common options first, in titled groups.

A settings class names its groups in `GROUPS`; fields that it does not name come last. The text of
an option is the string below its field, its default is the chosen preset's. Parts are listed by
name, with the options of the chosen part alone.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any

from dynmoe import registry

WIDTH, COLUMN = 100, 30
"""Columns of a line, and where texts begin."""


def help_text(config: Any, presets: list[str], preset: str, prog: str, description: str) -> str:
    """What `--help` prints for these settings, those of the chosen preset."""
    chosen = f"{{{','.join(presets)}}}"
    lines = [f"usage: {prog} [OPTIONS]", "", description, ""]
    lines += _entry(f"--preset {chosen}", f"ready settings ({preset})")
    for title, fields in groups(config).items():
        lines.append(f"{title}:")
        for field in fields:
            lines += _option(config, field)
    return "\n".join(lines)


def groups(config: Any) -> dict[str, list[dataclasses.Field[Any]]]:
    """Title -> fields, as `GROUPS` of the settings says; all others under "Other options"."""
    left = {f.name: f for f in dataclasses.fields(config)}
    found = {
        title: [left.pop(name) for name in names]
        for title, names in getattr(config, "GROUPS", {}).items()
    }
    return found | ({"Other options": list(left.values())} if left else {})


def texts(config: type) -> dict[str, str]:
    """Field -> the string below it, in the class or one that it inherits; one line each."""
    found: dict[str, str] = {}
    for cls in reversed(inspect.getmro(config)):
        if dataclasses.is_dataclass(cls):
            found |= _own_texts(cls)
    return found


@functools.cache
def _own_texts(cls: type) -> dict[str, str]:
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except OSError:  # a class that no file holds, such as the Config of a part without options
        return {}
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }  # fmt: skip


def shown(value: Any) -> str:
    """A value as one types it on a command line."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _option(config: Any, field: dataclasses.Field[Any]) -> list[str]:
    """The lines of one field: an option, a part with its options, or a group of options."""
    flag, value = f"--{field.name.replace('_', '-')}", getattr(config, field.name)
    text = texts(type(config)).get(field.name, "")
    if kind := field.metadata.get("kind"):
        names = " ".join(registry.names(kind))
        lines = _entry(flag, f"{names} ({value.part.name})")
        return lines + _nested(flag, value)
    if dataclasses.is_dataclass(value):
        return _nested(flag, value)
    if isinstance(value, bool):
        name = f"--no-{flag[2:]}" if value else flag
        return _entry(name, f"do not {text}" if value else text)
    return _entry(f"{flag} {_metavar(type(config), field)}", f"{text} ({shown(value)})")


def _nested(flag: str, value: Any) -> list[str]:
    """The options of a part or a group, side by side with their defaults."""
    options = [
        f"{flag}.{f.name.replace('_', '-')} {shown(getattr(value, f.name))}"
        for f in dataclasses.fields(value)
    ]
    rows, line = [], ""
    for option in options:
        if line and len(line) + len(option) + 6 > WIDTH:
            rows.append(line)
            line = ""
        line += f"  {option}" if line else option
    return [f"    {row}" for row in [*rows, *([line] if line else [])]]


def _metavar(config: type, field: dataclasses.Field[Any]) -> str:
    hint = typing.get_type_hints(config)[field.name]
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if typing.get_origin(hint) is tuple:
        return f"{arguments[0].__name__.upper()}..."
    kind = arguments[0] if arguments else hint
    return "PATH" if kind is Path else str(kind.__name__).upper()


def _entry(flag: str, text: str) -> list[str]:
    """An option and its text, in its column or, where the option is too long, just behind it."""
    start = max(COLUMN, len(flag) + 4)
    rows = textwrap.wrap(text, WIDTH - COLUMN, initial_indent=" " * (start - COLUMN)) or [""]
    rest = [f"{' ' * COLUMN}{row}" for row in rows[1:]]
    return [f"  {flag}".ljust(start) + rows[0].lstrip(), *rest]

"""`--help` of a command, written from its settings: common options first, in titled groups.

A settings class names its groups in `GROUPS`; fields that it does not name come last. The text of
an option is the string below its field, its default is the chosen preset's. Parts are listed by
name, with the options of the chosen part alone. Options of parts, and groups named in `BRIEF`,
stand side by side without texts.
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

WIDTH, COLUMN = 100, 28
"""Columns of a line, and where texts begin."""


def help_text(
    config: Any, presets: list[str], preset: str, prog: str, description: str, full: bool = False
) -> str:
    """What `--help` prints for these settings, those of the chosen preset.

    Args:
        full: as `--help-all` does, with the texts of all options.
    """
    more = "" if full else " `--help-all` explains all options."
    about = [textwrap.fill(" ".join(part.split()), WIDTH) for part in description.split("\n\n")]
    lines = [f"usage: {prog} [OPTIONS]", "", *about]
    lines.append(f"`python -m dynmoe.list KIND` explains parts.{more}")
    lines += _entry(f"--preset {{{','.join(presets)}}}", f"ready settings ({preset})")
    listed: set[str] = set()
    for title, fields in groups(config).items():
        lines.append(f"{title}:")
        if title in getattr(config, "BRIEF", ()) and not full:
            lines += _side_by_side([_brief(config, field, "--") for field in fields], "  ")
            continue
        for field in fields:
            rows = _option(config, field, listed, full)
            if not full and _fit(lines[-1], rows):
                lines[-1] += f"  {rows.pop(0).lstrip()}"
            lines += rows
    return "\n".join(lines)


def _fit(last: str, rows: list[str]) -> bool:
    """Whether a group of options without texts goes on in the last line, which is one, too."""
    brief = last.startswith("    --") and len(rows) == 1 and rows[0].startswith("    --")
    return brief and len(last) + len(rows[0]) - 2 <= WIDTH


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


def _option(
    config: Any, field: dataclasses.Field[Any], listed: set[str], full: bool, prefix: str = "--"
) -> list[str]:
    """The lines of one field: an option, a part with its options, or a group of options."""
    value: Any = getattr(config, field.name)
    text = texts(type(config)).get(field.name, "")
    flag = _flag(field, value, prefix)
    if isinstance(value, bool):
        return _entry(flag, f"do not {text}" if value else text)
    if not dataclasses.is_dataclass(value):
        default = "" if value in (None, "") else f" ({shown(value)})"
        return _entry(f"{flag} {_metavar(type(config), field)}", f"{text}{default}")
    lines = []
    if kind := field.metadata.get("kind"):
        part: Any = getattr(config, field.name).part
        names = f"a {kind}, as above" if kind in listed else " ".join(registry.names(kind))
        listed.add(kind)
        lines = _entry(f"{flag} {kind.upper()}", f"{names} ({part.name})")
    own = dataclasses.fields(value)
    if full:
        return lines + [row for f in own for row in _option(value, f, listed, full, f"{flag}.")]
    options = _side_by_side([_brief(value, f, f"{flag}.") for f in own], "    ")
    if lines and len(options) == 1 and len(lines[-1]) + len(options[0]) <= WIDTH:
        return [*lines[:-1], lines[-1] + options[0]]
    return lines + options


def _flag(field: dataclasses.Field[Any], value: Any, prefix: str) -> str:
    """The option that changes a field: that of a bool takes no value."""
    return f"{prefix}{'no-' if value is True else ''}{field.name.replace('_', '-')}"


def _brief(config: Any, field: dataclasses.Field[Any], prefix: str) -> str:
    """An option with its default, without a text."""
    value = getattr(config, field.name)
    flag = _flag(field, value, prefix)
    return flag if isinstance(value, bool) else f"{flag} {shown(value)}"


def _side_by_side(options: list[str], indent: str) -> list[str]:
    """Lines of options; none is broken, and two spaces lie between two."""
    rows: list[str] = []
    for option in options:
        if rows and len(rows[-1]) + 2 + len(option) <= WIDTH:
            rows[-1] += f"  {option}"
        else:
            rows.append(f"{indent}{option}")
    return rows


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
    indent = " " * (start - COLUMN)
    rows = textwrap.wrap(text, WIDTH - COLUMN, initial_indent=indent, break_on_hyphens=False)
    rows = rows or [""]
    rest = [f"{' ' * COLUMN}{row}" for row in rows[1:]]
    return [f"  {flag}".ljust(start) + rows[0].lstrip(), *rest]

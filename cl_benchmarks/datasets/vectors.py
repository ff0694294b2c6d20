"""Labelled vectors in time order, from text files: sensors, markets, any table of numbers.

What is wrong with a file is refused with its name and line: nothing is filled in or left out.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.images import Dataset, ImageData
from dynmoe.errors import UserError

GAPS = {"", "?", "na", "n/a", "nan", "null", "none", "-"}
"""What stands for a missing field, in lower case."""

Rows = list[tuple[int, list[str]]]
"""Fields of each row, after its line number in the file."""


class VectorStream(Dataset, name="stream", source="ours"):
    """Labelled vectors in time order from a text file, for --protocol online and --network mlp."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """Where the rows are, and how they are scaled."""

        file: Path | None = None
        """a row of numbers per time step, separated by commas, semicolons, tabs or blanks; a first
        line of names is seen by itself"""
        labels: Path | None = None
        """a file with a label per row; without it, a column of `file` has them"""
        label_column: str | None = None
        """that column: its name, or its number from 0 (-1 for the last, the default)"""
        first: float = 0.05
        """share of the rows, the first ones, whose mean and deviation standardise all: later ones
        are the future"""
        scale: Literal["first", "past"] = "first"
        """after those: as they were scaled, or by all rows up to each, for data that drift"""
        clip: float = 10.0
        """largest standardised value, in deviations; larger ones are cut off; 0 for no limit"""

    def __init__(self, config: Config) -> None:
        if not 0 < config.first <= 1:
            raise UserError(f"dataset first {config.first} must be above 0 and at most 1")
        if not 0 <= config.clip < math.inf:
            raise UserError(f"dataset clip {config.clip} must be at least 0")
        super().__init__(config)

    def load(self, seed: int) -> ImageData:
        """Rows as float32 `[N, D, 1, 1]`, standardised; test rows are the same, see `online`.

        A feature that is constant in those rows is only centred. Classes are numbered by the
        sorted labels of all rows, as numbers if all are; the head has an output for each from the
        start, also for those that come late.

        Raises:
            UserError: names the file and line, and what is wrong there.
        """
        c = self.config
        if c.file is None:
            raise UserError("dataset stream reads a file of yours; use --dataset.file FILE")
        if c.labels is not None and c.label_column is not None:
            raise UserError(
                f"dataset label_column has no effect: labels come from {c.labels}; leave it out"
            )
        header, rows = read_table(c.file.expanduser(), c.label_column)
        if c.labels is None:
            column = _label_column(c.file, header, rows, c.label_column)
            labels = [(number, fields.pop(column)) for number, fields in rows]
            if header:
                header.pop(column)
            else:
                _refuse_names(c.file, labels)
            label_file = c.file
        else:
            labels, label_file = (
                _read_labels(c.labels.expanduser(), len(rows), bool(header)),
                c.labels,
            )
            if len(labels) != len(rows):
                raise UserError(
                    f"{c.labels} has {len(labels)} labels and {c.file} {len(rows)} rows (line "
                    f"{rows[-1][0]} is its last); each row needs one"
                )
        if not rows[0][1]:
            raise UserError(f"{c.file} has no column besides the labels")
        values = torch.from_numpy(_numbers(c.file, header, rows))
        values = standardised(values, c.first, c.clip, c.scale).float()[:, :, None, None]
        numbers, classes = _class_numbers(label_file, labels)
        return ImageData(
            name=c.file.stem,
            train_images=values,
            train_labels=numbers,
            test_images=values,
            test_labels=numbers,
            num_classes=classes,
            in_time_order=True,
            tables=tuple(path.expanduser() for path in (c.file, c.labels) if path is not None),
        )


def standardised(
    values: Tensor, first: float, clip: float, scale: Literal["first", "past"] = "first"
) -> Tensor:
    """Rows `[N, D]` less a mean, over a deviation, within +- clip.

    Those of the first rows; or, with scale "past", for later rows those of all rows up to each.
    """
    count = max(1, round(first * len(values)))
    known = values[:count]
    mean, std = known.mean(0), known.std(0, correction=0)
    if scale == "past":
        shifted, rows = values - mean, torch.arange(1, len(values) + 1)[:, None]
        means = shifted.cumsum(0) / rows
        spread = (shifted.square().cumsum(0) / rows - means.square()).clamp(min=0).sqrt()
        mean = torch.cat([mean.expand(count, -1), mean + means[count:]])
        std = torch.cat([std.expand(count, -1), spread[count:]])
    std = torch.where(std <= 1e-9 * mean.abs().clamp(min=1), 1.0, std)
    out = (values - mean) / std
    return out.clamp(-clip, clip) if clip else out


def read_table(path: Path, label_column: str | None = None) -> tuple[list[str], Rows]:
    """The names in a table's first line, if it has them, and its rows, all equally long.

    The first line has names if none of its fields is a number or missing (but for the label's,
    which may be text); or if `label_column` is a name.

    Raises:
        UserError: the file cannot be read, is empty, has an empty line or rows of other lengths.
    """
    lines = _text_lines(path)
    separator = _separator(lines)
    rows: Rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path} line {number} is empty; fill or remove it")
        fields = _fields(line, separator)
        if rows and len(fields) != len(rows[0][1]):
            raise UserError(
                f"{path} line {number} has {len(fields)} fields, and line 1 has "
                f"{len(rows[0][1])}; complete or remove it"
            )
        rows.append((number, fields))
    named = label_column is not None and not _is_integer(label_column)
    names = rows[0][1]
    text = [f for f in names if f.lower() not in GAPS and _number(f) is None]
    if named or (len(text) == len(names) and len(names) > 1):
        rows.pop(0)
    else:
        names = []
    if not rows:
        raise UserError(f"{path} has no rows below its first line")
    return list(names), rows


def _separator(lines: list[str]) -> str | None:
    """What stands between fields: of what is in line 1, what gives line 2 as many; None: spaces."""
    found = [s for s in (",", ";", "\t") if s in lines[0]]
    counts = {s: {len(_fields(line, s)) for line in lines[:2]} for s in found}
    alike = [s for s in found if len(counts[s]) == 1 and counts[s] != {1}]
    return next(iter([*alike, *found]), None)


def _fields(line: str, separator: str | None) -> list[str]:
    """The fields of a line, without spaces around them."""
    if separator is None:
        return line.split()
    parts = next(csv.reader([line], delimiter=separator)) if '"' in line else line.split(separator)
    return [part.strip() for part in parts]


def _text_lines(path: Path) -> list[str]:
    """Lines without their ends, and without blank ones at the file's end."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from None
    lines = text.replace("\r\n", "\n").rstrip().split("\n")
    if not lines[0].strip() and len(lines) == 1:
        raise UserError(f"{path} is empty; it takes a row of numbers per time step")
    return lines


def _label_column(path: Path, header: list[str], rows: Rows, wanted: str | None) -> int:
    """Number of the column of labels."""
    count = len(rows[0][1])
    if wanted is None:
        return count - 1
    if _is_integer(wanted):
        if -count <= int(wanted) < count:
            return int(wanted) % count
        raise UserError(
            f"dataset label_column {wanted}: columns of {path} are 0 to {count - 1}; -1 is the last"
        )
    if wanted in header:
        return header.index(wanted)
    raise UserError(
        f"dataset label_column {wanted!r}: line 1 of {path} names {', '.join(header)}; give one of "
        "them, or a number from 0"
    )


def _read_labels(path: Path, rows: int, header: bool) -> list[tuple[int, str]]:
    """The labels in a file of their own, after their lines' numbers."""
    labels = []
    for number, line in enumerate(_text_lines(path), start=1):
        label = line.strip().strip(",;").strip('"')
        if len(line.replace(",", " ").replace(";", " ").split()) > 1 and '"' not in line:
            raise UserError(f"{path} line {number} has more than one label: {line.strip()!r}")
        labels.append((number, label))
    if header and len(labels) == rows + 1:
        labels.pop(0)  # a name, as the other file has
    return labels


def _numbers(path: Path, header: list[str], rows: Rows) -> np.ndarray:
    """float64 `[N, D]`."""
    out = np.empty((len(rows), len(rows[0][1])))
    for index, (number, fields) in enumerate(rows):
        for column, field in enumerate(fields):
            value = _number(field)
            if value is None or not abs(value) <= float(np.finfo(np.float32).max):
                what = repr(header[column]) if header else str(column + 1)
                if field.lower() in GAPS:
                    reason = "is missing" if field == "" else f"is missing ({field})"
                elif value is None:
                    reason = f"is no number: {field!r}"
                else:
                    reason = f"is not finite: {field}"
                raise UserError(
                    f"{path} line {number}: field {what} {reason}; correct or remove the row"
                )
            out[index, column] = value
    return out


def _class_numbers(path: Path, labels: list[tuple[int, str]]) -> tuple[Tensor, int]:
    """Labels as int64 `[N]` in 0 .. C-1, in the order of sorted labels; and C."""
    for number, label in labels:
        if label.lower() in GAPS:
            shown = f" ({label})" if label else ""
            raise UserError(f"{path} line {number}: the label is missing{shown}; add it")
    values = [_number(label) for _, label in labels]
    own = values if all(v is not None for v in values) else [label for _, label in labels]
    known = sorted(set(own))  # type: ignore[type-var]
    if len(known) < 2:
        raise UserError(f"{path} has 1 label, {labels[0][1]!r}, in all rows; it takes two classes")
    place = {label: number for number, label in enumerate(known)}
    return torch.tensor([place[label] for label in own]), len(known)


def _refuse_names(path: Path, labels: list[tuple[int, str]]) -> None:
    """Refuse a first line of names that look like numbers: its label is of another kind.

    Raises:
        UserError: it is text and all others are numbers, or the reverse.
    """
    first, *others = [_number(label) is None for _, label in labels]
    if len(others) > 1 and set(others) == {not first}:
        kinds = ("a number", "text")
        raise UserError(
            f"{path} line 1: the label {labels[0][1]!r} is {kinds[first]}, and all others are "
            f"{kinds[not first]}; if these are the columns' names, remove the line"
        )


def _number(field: str) -> float | None:
    """The value of a field; None of text. Underscores, which Python allows, count as text."""
    try:
        return None if "_" in field else float(field)
    except ValueError:
        return None


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdigit()

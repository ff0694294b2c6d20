"""Labelled vectors from text files, in every form that is around, and when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks.images import ImageData
from dynmoe import registry
from dynmoe.errors import UserError

ROWS = [(1.0, 10.0, "a"), (3.0, 10.0, "b"), (5.0, 11.0, "a"), (7.0, 12.0, "c")]


def _load(folder: Path, text: str, labels: str | None = None, **options: Any) -> ImageData:
    file = folder / "own.data"
    file.write_text(text)
    if labels is not None:
        options["labels"] = folder / "own.labels"
        options["labels"].write_text(labels)
    options = {"first": 0.5, **options}
    return registry.get("dataset", "stream").Config(file=file, **options).build().load(0)


def _text(separator: str, header: bool = False, end: str = "\n") -> str:
    lines = [separator.join(("x", "y", "class"))] if header else []
    lines += [separator.join((str(x), str(y), label)) for x, y, label in ROWS]
    return end.join(lines) + end


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("separator", [",", ", ", ";", "\t", " ", "   "])
def test_reads_tables_with_the_label_last(separator: str, header: bool, tmp_path: Path) -> None:
    data = _load(tmp_path, _text(separator, header), clip=0)
    assert data.name == "own" and data.shape == (2, 1, 1) and data.in_time_order
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.tolist() == [0, 1, 0, 2] and data.num_classes == 3
    # mean and deviation of the first half: 2 and 1; a constant is only centred
    assert data.train_images[:, 0].flatten().tolist() == [-1, 1, 3, 5]
    assert data.train_images[:, 1].flatten().tolist() == [0, 0, 1, 2]


def test_far_values_are_clipped_and_later_rows_do_not_scale_earlier_ones(tmp_path: Path) -> None:
    data = _load(tmp_path, _text(","), clip=4)
    assert data.train_images[:, 0].flatten().tolist() == [-1, 1, 3, 4]
    other = _load(tmp_path, _text(",").replace("7.0", "7e9"), clip=4)
    assert other.train_images[:3].equal(data.train_images[:3])


def test_labels_in_a_file_of_their_own_are_numbers_in_order(tmp_path: Path) -> None:
    table = "1 2\r\n3 4\r\n5 6\r\n\r\n"
    data = _load(tmp_path, table, "10\n9\n10.0\n")
    assert data.train_labels.tolist() == [1, 0, 1] and data.num_classes == 2
    named = _load(tmp_path, "x,y\n1,2\n3,4\n", "class\nup\ndown\n")
    assert named.train_labels.tolist() == [1, 0] and len(named.train_images) == 2


@pytest.mark.parametrize(("column", "labels"), [
    ("x", [0, 1, 2, 3]), ("0", [0, 1, 2, 3]), ("-2", [0, 0, 1, 2]), ("1", [0, 0, 1, 2]),
])  # fmt: skip
def test_the_label_column_may_be_named(column: str, labels: list[int], tmp_path: Path) -> None:
    text = _text(",", header=True).replace("a", "1").replace("b", "2").replace("c", "3")
    text = text.replace("3l1ss", "class")
    data = _load(tmp_path, text, label_column=column)
    assert data.train_labels.tolist() == labels and data.shape == (2, 1, 1)


def test_commas_within_names_separate_nothing(tmp_path: Path) -> None:
    data = _load(tmp_path, '"x, 1"\t"y"\t"label"\n1\t2\ta\n3\t4\tb\n')
    assert data.shape == (2, 1, 1) and data.num_classes == 2


BAD = {
    "empty file": ("", None, r"own\.data is empty"),
    "only names": ("x,y\n", None, r"own\.data has no rows below its first line"),
    "missing field": ("1,2,a\n3,b\n", None, r"own\.data line 2 has 2 fields, and line 1 has 3"),
    "field too many": ("1 2 a\n3 4 5 b\n", None, r"line 2 has 4 fields, and line 1 has 3"),
    "empty field": ("x,y,l\n1,2,a\n3,,b\n", None, r"data line 3: field 'y' is missing; correct"),
    "question mark": ("1,2,a\n?,2,b\n", None, r"own\.data line 2: field 1 is missing \(\?\)"),
    "nan": ("1 2 a\n3 NaN b\n", None, r"own\.data line 2: field 2 is missing \(NaN\)"),
    "infinite": ("1,2,a\n3,inf,b\n", None, r"own\.data line 2: field 2 is not finite: inf"),
    "overflow": ("1,2,a\n3,1e39,b\n", None, r"line 2: field 2 is not finite: 1e39"),
    "text": ("1,2,a\n3,1O,b\n", None, r"own\.data line 2: field 2 is no number: '1O'"),
    "text in line 1": ("1,two,a\n3,4,b\n", None, r"own\.data line 1: field 2 is no number"),
    "underscore": ("1,2,a\n3,1_0,b\n", None, r"line 2: field 2 is no number: '1_0'"),
    "gap": ("1,2,a\n\n3,4,b\n", None, r"own\.data line 2 is empty; fill or remove it"),
    "no label": ("1,2,a\n3,4,\n", None, r"own\.data line 2: the label is missing; add it"),
    "one class": ("1,2,a\n3,4,a\n", None, r"own\.data has 1 label, 'a', in all rows"),
    "no features": ("a\nb\n", None, r"own\.data has no column besides the labels"),
    "few labels": ("1,2\n3,4\n", "a\n", r"labels has 1 labels and .*data 2 rows \(line 2 is"),
    "many labels": ("1,2\n3,4\n", "a\nb\na\n", r"own\.labels has 3 labels and .* 2 rows"),
    "label gap": ("1,2\n3,4\n5,6\n", "a\n\nb\n", r"own\.labels line 2: the label is missing"),
    "two labels": ("1,2\n3,4\n", "a\nb c\n", r"labels line 2 has more than one label: 'b c'"),
    "years for names": ("2020,2021\n1,a\n2,b\n", None, r"line 1: the label '2021' is a number"),
    "a name for the label": ("7,label\n1,0\n2,1\n", None, r"line 1: the label 'label' is text"),
    "no labels": ("1,2\n3,4\n", "", r"own\.labels is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    text, labels, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        _load(tmp_path, text, labels)
    assert "\n" not in str(caught.value)


def test_options_and_files_are_checked(tmp_path: Path) -> None:
    part = registry.get("dataset", "stream")
    with pytest.raises(UserError, match="use --dataset.file FILE"):
        part.Config().build().load(0)
    with pytest.raises(UserError, match="cannot read .*none: No such file"):
        part.Config(file=tmp_path / "none").build().load(0)
    (tmp_path / "own.data").write_bytes(b"\xff\xfe1,2")
    with pytest.raises(UserError, match="it is no UTF-8 text"):
        part.Config(file=tmp_path / "own.data").build().load(0)
    for options in ({"first": 0.0}, {"first": 1.5}, {"clip": -1.0}):
        with pytest.raises(UserError, match=f"dataset {next(iter(options))} "):
            part.Config(**options).build()
    with pytest.raises(UserError, match="label_column has no effect"):
        _load(tmp_path, "1,2\n3,4\n", "a\nb\n", label_column="0")
    with pytest.raises(UserError, match="label_column 'z': line 1 of .* names x, y, class"):
        _load(tmp_path, _text(",", header=True), label_column="z")
    with pytest.raises(UserError, match=r"label_column 3: columns of .* are 0 to 2"):
        _load(tmp_path, _text(","), label_column="3")

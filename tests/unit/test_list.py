"""`python -m dynmoe.list`, the catalogue that it writes, and the sources that parts name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from dynmoe import list as parts
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.lab.markdown import cell
from dynmoe.registry import PartConfig

ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "docs" / "catalogue.md"
UPDATE = "python -m dynmoe.list --markdown > docs/catalogue.md"
PARTS = [(kind, name) for kind in registry.PACKAGES for name in registry.names(kind)]


def command(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, its output piped."""
    return subprocess.run(
        [sys.executable, "-m", "dynmoe.list", *argv],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_says_where_it_is_from(kind: str, name: str) -> None:
    source = registry.get(kind, name).source
    assert source == "ours" or source.startswith("ours;") or re.search(r"\b(19|20)\d\d\b", source)


def test_the_catalogue_is_up_to_date() -> None:
    fresh = parts.catalogue(registry.PACKAGES)
    assert CATALOGUE.read_text() == fresh, f"docs/catalogue.md is out of date; run: {UPDATE}"
    assert UPDATE in fresh


def test_the_command_writes_the_catalogue() -> None:
    done = command("pruning", "--markdown")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == parts.catalogue(["pruning"])
    assert done.stdout.removeprefix(parts.HEADER) in CATALOGUE.read_text()


def test_the_catalogue_names_every_part_in_tables_that_hold_together() -> None:
    text = parts.catalogue(registry.PACKAGES)
    sections = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    found = []
    for kind, body in zip(sections[::2], sections[1::2], strict=True):
        rows = [line for line in body.splitlines() if line.startswith("|")]
        cells = [re.split(r"(?<!\\)\|", row) for row in rows]
        assert {len(row) for row in cells} == {6}, kind  # four cells, and nothing at either end
        found += [(kind, row[1].strip(" `")) for row in cells[2:]]
    assert found == PARTS


def test_parts_of_other_origin_are_listed_but_not_in_the_catalogue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry._PARTS, "pruning", dict(registry._PARTS["pruning"]))

    class Mine(registry.get("pruning", "first"), name="zzz-mine"):  # type: ignore[misc]
        """Keeps what I like | and more."""

    assert "zzz-mine" not in parts.catalogue(["pruning"])
    parts.main(["pruning"])
    tail = capsys.readouterr().out.split("  pruning zzz-mine\n")[1]
    assert tail.splitlines() == [
        "      Keeps what I like | and more.",
        "      source: ours",
        f"      defined in: {__file__}",
    ]


def test_a_pipe_gets_whole_lines() -> None:
    done = command("metric", COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "metric (dynmoe/plasticity/metrics.py)"
    for name in registry.names("metric"):
        at = lines.index(f"  metric {name}")
        assert lines[at + 1] == f"      {registry.summary('metric', name)}"
        assert lines[at + 2] == f"      source: {registry.get('metric', name).source}"
    assert "      options: taus=0.0 0.025 0.1, firing-rate=0.01" in lines


def test_a_terminal_gets_lines_that_fit() -> None:
    narrow = command("metric", COLUMNS="40", FORCE_COLOR="1", TERM="xterm")
    plain = re.sub(r"\x1b\[[\d;]*m", "", narrow.stdout)
    assert plain != narrow.stdout
    assert max(len(line) for line in plain.splitlines()) <= 40
    assert plain.split() == command("metric").stdout.split()


def test_an_unknown_kind_is_one_line_and_exit_code_2() -> None:
    done = command("roter")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: unknown kind 'roter'; known: {', '.join(registry.PACKAGES)}. "
        "Did you mean 'router'?\n"
    )
    with pytest.raises(UserError, match="unknown kind 'xyzzy'"):
        parts.main(["xyzzy"])


def test_cells_keep_their_signs_in_prose_and_in_code() -> None:
    assert cell("a * b < |c|, `a * b < |c|` *") == (r"a \* b &lt; \|c\|, `a * b < \|c\|` \*")


@dataclass(frozen=True, kw_only=True)
class Options(PartConfig):
    """Every form that an option can take."""

    number: float = 0.5
    two_words: bool = False
    mode: Literal["slow", "fast", "faster"] = "fast"
    empty: str = ""
    nothing: int | None = None
    folder: Path = Path("some") / "where"
    several: tuple[int, ...] = (1, 2)
    none_yet: tuple[int, ...] = ()
    made: tuple[str, ...] = field(default_factory=lambda: ("a", "b"))
    needed: int


def test_options_read_as_on_the_command_line() -> None:
    assert parts.options(Options) == [
        "number=0.5",
        "two-words=False",
        "mode=fast (or slow, faster)",
        "empty=''",
        "nothing=None",
        f"folder={Path('some') / 'where'}",
        "several=1 2",
        "none-yet=()",
        "made=a b",
        "needed",
    ]
    assert parts.options(PartConfig) == []

"""One page about finished runs, which needs no network; tables and figures for a paper beside it.

The page is `report.html`; all that stands in it comes from files of runs and is escaped. It has no
script, and its content security policy lets no request leave it. The same runs give the same bytes.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError
from dynmoe.lab.comparison import Row, columns_table, compare, comparison_table, pairs
from dynmoe.lab.events import Events, read_events
from dynmoe.lab.files import make_folder, write_atomic
from dynmoe.lab.finished import Group, LeftOut, printable
from dynmoe.lab.latex import booktabs
from dynmoe.lab.report_figures import Drawing, draw_all, most_telling
from dynmoe.lab.report_tables import (
    Table,
    comparison_csv,
    cost_table,
    environment_table,
    growth_table,
    runs_csv,
    settings_tables,
)
from dynmoe.lab.statistics import Family

HEAT_MAPS = "experts/"
"""How the tags of router maps begin, in the TensorBoard logs of all commands."""
MOST_MAPS = 6
"""Router maps of a variant."""
MAP_BYTES = 3_000_000
"""Of all router maps of a page."""


@dataclass(frozen=True)
class Section:
    """One stream of a group."""

    group: Group
    stream: str
    """"" where the group has no others"""
    rows: list[Row]
    comparison: Table
    columns: Table
    drawings: list[Drawing]
    maps: list[tuple[str, dict[str, str]]]
    """variant, and tag -> PNG file in base64"""
    growths: Table
    cost: Table

    @property
    def title(self) -> str:
        """Group and stream."""
        return ": ".join(filter(None, [self.group.title, self.stream]))

    @property
    def about(self) -> str:
        """What the comparison is about."""
        experiment = self.group.experiment
        unit = ", in %" if experiment.unit(experiment.metric)[1] else ""
        return f"{experiment.describe(experiment.metric, experiment.at)}{unit}"


@dataclass(frozen=True)
class Chapter:
    """A group."""

    group: Group
    sections: list[Section]
    differences: Table
    common: Table


def write_report(
    out: Path, groups: list[Group], left_out: list[LeftOut], title: str, question: str
) -> None:
    """Write `report.html`, `tables.tex`, `comparison.csv`, `runs.csv`, and figures as SVG and PDF.

    Each file is written atomically.

    Args:
        out: made where it is missing.
        groups: at least one, see `Collection.groups`.
        left_out: what the page says that it does not show.
        title: of the page.
        question: stands above; "" for none.

    Raises:
        UserError: `out` cannot be made.
        ResourceError: the disk is full.
    """
    try:
        make_folder(out)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}; use another --out") from None
    family = Family(max(1, sum(pairs(group, stream) for group in groups for stream in group.runs)))
    events: dict[Path, Events] = {}
    chapters = []
    for place, group in enumerate(groups, start=1):
        sections = [
            _section(group, stream, f"{group.experiment.command}-{place}-{number}", family, events)
            for number, stream in enumerate(group.runs, start=1)
        ]
        chapters.append(Chapter(group, sections, *settings_tables(group)))
    page = _render(
        title=printable(title), question=printable(question), chapters=chapters, family=family,
        left_out=left_out, runs=len(events), environment=environment_table(groups),
    )  # fmt: skip
    sections = [section for chapter in chapters for section in chapter.sections]
    files = {
        "tables.tex": "\n".join(map(_latex, sections)),
        "comparison.csv": comparison_csv([(s.group, s.stream, s.rows) for s in sections]),
        "runs.csv": runs_csv(groups, events),
        "report.html": page,
    }
    for drawing in (drawing for section in sections for drawing in section.drawings):
        write_atomic(out / f"{drawing.name}.svg", drawing.svg)
        write_atomic(out / f"{drawing.name}.pdf", drawing.pdf)
    for name, text in files.items():
        write_atomic(out / name, text.encode())


def _section(
    group: Group, stream: str, name: str, family: Family, events: dict[Path, Events]
) -> Section:
    """All of one stream; what its runs' TensorBoard files tell is added to `events`."""
    variants, rows = group.runs[stream], compare(group, stream, family)
    pictured = most_telling(rows)
    maps = []
    room = MAP_BYTES - sum(len(i) for one in events.values() for i in one.images.values())
    for variant, runs in variants.items():
        for seed, run in runs.items():
            wanted = variant in pictured and seed == min(runs) and room > 0
            found = read_events(run.folder, HEAT_MAPS if wanted else None)
            kept = dict(list(found.images.items())[:MOST_MAPS])
            room -= sum(map(len, kept.values()))
            events[run.folder] = Events(found.seconds, kept)
            if kept:
                shown = {printable(t): base64.b64encode(i).decode() for t, i in kept.items()}
                maps.append((f"{variant}, seed {seed}", shown))
    return Section(
        group, stream, rows, comparison_table(group.experiment, rows),
        columns_table(group.experiment, rows), draw_all(group, stream, rows, name), maps,
        growth_table(variants), cost_table(variants, events),
    )  # fmt: skip


def _latex(section: Section) -> str:
    """Both tables of a stream; the verdicts' words are for the page."""
    compared = [row[:-1] for row in section.comparison]
    about = f"{section.title}: {section.about}"
    return "\n".join([
        booktabs(compared, f"{about}; mean and interquartile mean over seeds [95 % intervals]"),
        booktabs(section.columns, f"{section.title}: mean over seeds [95 % intervals]"),
    ])  # fmt: skip


def _render(**values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = Path(__file__).with_name("report.html").read_text()
    return environment.from_string(text).render(**values)

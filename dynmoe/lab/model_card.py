"""The card of an exported network: what it is, on what and how it was trained, how well it does.

The first lines are what model hubs read (YAML between two lines of dashes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmoe.lab.experiment import Experiment

UNKNOWN = "unknown"
"""The licence of a network for which none was chosen."""
LOAD = """```python
from dynmoe.export import {function}
model = {function}("{place}")
```"""


@dataclass(frozen=True)
class Card:
    """What a card tells."""

    experiment: Experiment
    """what the run did"""
    title: str
    """data, order, network"""
    method: str
    """the variant's name"""
    settings: dict[str, Any]
    """flat, those that decide the run's numbers"""
    parameters: int
    """of the network"""
    use: str
    """shapes that go in and come out"""
    licence: str
    """of the weights: an identifier such as mit, or `UNKNOWN`"""
    summary: dict[str, Any] | None
    """the run's, None while it is unfinished"""
    step: int
    """of the checkpoint"""
    session: dict[str, Any]
    """of environment.json: command, versions, device"""
    hub: str = ""
    """OWNER/NAME on a hub that it is sent to"""

    def text(self) -> str:
        """The card, Markdown."""
        return "\n\n".join([
            self._head(), f"# {self.method}: {self.title}", self._what(),
            f"## Load it\n\n{self._load()}\n\n{self.use}",
            f"## Training\n\n{self._training()}",
            f"## Metrics\n\n{self._metrics()}",
            f"## Settings\n\n{_table(('setting', 'value'), self.settings.items())}",
            f"## Licence\n\n{self._licence()}\n",
        ])  # fmt: skip

    def _head(self) -> str:
        licence = "other" if self.licence == UNKNOWN else self.licence
        lines = ["---", f"license: {json.dumps(licence)}", "library_name: dynmoe", "tags:"]
        lines += ["- mixture-of-experts", f"- dynmoe-{self.experiment.command}", "---"]
        return "\n".join(lines)

    def _load(self) -> str:
        if self.hub:
            return LOAD.format(function="load_from_hub", place=self.hub)
        return LOAD.format(function="load", place="path/of/this/folder")

    def _what(self) -> str:
        return (
            f"A network of {self.parameters:,} parameters, trained by `dynmoe "
            f"{self.experiment.command}` with the method `{self.method}`. Data, order and network: "
            f"{self.title}."
        )

    def _training(self) -> str:
        known = ("dynmoe", "commit", "python", "device")
        rows = [(name, self.session.get(name)) for name in known]
        rows += [(name, v) for name, v in (self.session.get("packages") or {}).items() if v]
        command = self.session.get("command", "not known")
        return f"```bash\n{command}\n```\n\n{_table(('with', 'version'), rows)}"

    def _metrics(self) -> str:
        if self.summary is None:
            return (
                f"None: these are the weights after step {self.step}, not those of the end of a "
                "finished run."
            )
        rows = []
        for _, metric, at in self.experiment.columns:
            value = self.experiment.value(self.summary, metric, at)
            factor, unit, digits = self.experiment.unit(metric)
            if not math.isnan(value):
                unit = " %" if unit == " points" else unit
                rows.append(
                    (self.experiment.describe(metric, at), f"{factor * value:.{digits}f}{unit}")
                )
        return f"Of this one run.\n\n{_table(('metric', 'value'), rows)}"

    def _licence(self) -> str:
        data = "The terms of the data that it was trained on hold besides."
        if self.licence == UNKNOWN:
            chosen = "none chosen yet; export with `--license NAME` before you share them"
            return f"Licence of the weights: {chosen}. {data}"
        return f"Licence of the weights: {self.licence}. {data}"


def shown_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for the card: of a path its last part alone, as folders say much of a machine."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in settings.items()
    }


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    """A Markdown table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(shown.split()).replace("|", "\\|")

"""What TensorBoard shows of a log: which measures, by which names, in which order.

`log.jsonl` has every number by the name that programs read, a large run some hundreds of names.
TensorBoard sorts its charts by name, and a person asks for a few: a board names them so that what
is asked for comes first. `--mirror tensorboard` shows all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

EXPERTS = "2 growth/experts"
"""The chart of every board in which a growth is a step."""
GROWTH = {
    "experts": "",  # drawn by `Logger.experts`, which makes the step
    "change of the output": r"growth/output_change",
    "loss before": r"growth/loss_before",
    "loss after": r"growth/loss_after",
}
"""The group of growths, the same for all commands that can tell the change."""


class Board:
    r"""Charts of TensorBoard, made from tags of a log.

    Args:
        groups: group -> chart -> a regular expression that fits the whole of its tags. A name may
            hold what a bracket of the expression found, as `\\1`. Tags with one name become one
            chart, that of their mean, such as those of all layers. An empty expression fits none.
        lines: page -> chart -> names `GROUP/CHART`, as regular expressions: charts of several
            lines, for the tab Custom Scalars.
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, str]],
        lines: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
    ) -> None:
        self.rules = [
            (re.compile(tag), f"{group}/{chart}")
            for group, charts in groups.items() for chart, tag in charts.items() if tag
        ]  # fmt: skip
        self.lines = lines or {}
        self._names: dict[str, str | None] = {}

    def name(self, tag: str) -> str | None:
        """The chart of a tag, `GROUP/CHART`; None where it is not shown."""
        if tag not in self._names:
            fits = ((rule.fullmatch(tag), name) for rule, name in self.rules)
            found = (fit.expand(name) for fit, name in fits if fit)
            self._names[tag] = next(found, None)
        return self._names[tag]

    def points(self, values: Mapping[str, float]) -> dict[str, float]:
        """Chart -> what it shows of a line of the log."""
        shown: dict[str, list[float]] = {}
        for tag, value in values.items():
            if (name := self.name(tag)) is not None:
                shown.setdefault(name, []).append(value)
        return {name: sum(found) / len(found) for name, found in shown.items()}

    def layout(self) -> dict[str, Any]:
        """`lines` as `SummaryWriter.add_custom_scalars` takes them."""
        return {
            page: {chart: ("Multiline", [f"^{name}$" for name in names])
                   for chart, names in charts.items()}
            for page, charts in self.lines.items()
        }  # fmt: skip


class Everything(Board):
    """The board of a log that nobody has made one for: each tag by its own name."""

    def __init__(self) -> None:
        super().__init__({})

    def name(self, tag: str) -> str:
        """The tag."""
        return tag

"""Figures of finished comparisons drawn again from their results.json, without the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError
from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.figures import told_chance
from dynmoe.lab.study import Study


def read_results(file: Path) -> dict[str, Any]:
    """What a results.json holds.

    Raises:
        UserError: no such file, or another kind of file.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise UserError(f"cannot read {file}: {reason}; name a results.json") from error
    if not isinstance(found, dict) or "seeds" not in found:
        raise UserError(f"{file} is no results.json of a comparison; name one")
    return found


def redraw(file: Path, found: dict[str, Any], experiment: Experiment, study: Study | None) -> Path:
    """Draw a comparison's figure beside its numbers, as it is drawn today; its path.

    Args:
        file: where the numbers are. The figure of results.json is figure.png, that of class.json
            class.png.
        found: what it holds.
        experiment: of the command whose runs they are.
        study: that they answer, or None.

    Raises:
        UserError: the numbers are another command's, or not enough for a figure.
    """
    entries = found.get("streams") or {"": found.get("variants")}
    try:
        runs = {s: {v: experiment.summaries(own) for v, own in variants.items()}
                for s, variants in entries.items()}  # fmt: skip
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file} does not hold what the figure shows") from error
    chance = {s: float(level) for s, level in found.get("chance", {}).items()}
    results = Results(runs, {stream: {} for stream in runs}, experiment, chance=chance)
    path = file.with_name("figure.png" if file.name == "results.json" else f"{file.stem}.png")
    title = f"{found.get('study') or found.get('title') or file.stem} "
    title += f"({found['seeds']} seeds, 95 % t intervals{told_chance(chance.values())})"
    (study or experiment).draw(path, results, title)
    return path

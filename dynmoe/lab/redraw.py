"""Figures of finished comparisons drawn again from their results.json, without the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynmoe import registry
from dynmoe.commands import load
from dynmoe.errors import UserError
from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.study import Study


def redraw(file: Path) -> Path:
    """Draw a comparison's figure beside its numbers, as it is drawn today; its path.

    Args:
        file: results.json of a study of `cl`, `tta` or `dg`, or of a sweep or run of `cl`. The
            figure of `results.json` is figure.png, that of `class.json` class.png.

    Raises:
        UserError: no such file, another kind of file, or numbers of another command.
    """
    found = _read(file)
    study, experiment = _whose(found)
    entries = found.get("streams") or {"": found.get("variants")}
    try:
        runs = {s: {v: experiment.summaries(own) for v, own in variants.items()}
                for s, variants in entries.items()}  # fmt: skip
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file} does not hold what the figure shows") from error
    results = Results(runs, {stream: {} for stream in runs}, experiment)
    path = file.with_name("figure.png" if file.name == "results.json" else f"{file.stem}.png")
    title = f"{found.get('study') or found.get('title') or file.stem} "
    title += f"({found['seeds']} seeds, 95 % t intervals)"
    (study or experiment).draw(path, results, title)
    return path


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise UserError(f"cannot read {file}: {reason}; name a results.json") from error
    if not isinstance(found, dict) or "seeds" not in found:
        raise UserError(f"{file} is no results.json of a comparison; name one")
    return found


def _whose(found: dict[str, Any]) -> tuple[Study | None, Experiment]:
    """The study whose numbers they are, None for a sweep, and the command's experiment."""
    name = found.get("study")
    if name not in registry.names("study"):
        return None, load("cl").experiment()
    study: Study = registry.get("study", name)()
    return study, study.experiment(load(study.command).experiment())

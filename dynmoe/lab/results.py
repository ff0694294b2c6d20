"""What runs leave, as values: the result of a command, and all runs below a folder as a table."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynmoe.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True)
class RunRow:
    """One run: its settings and figures, flat."""

    command: str
    """cl, rl, tta or dg"""
    folder: Path
    """the run's"""
    seed: int
    """what its random numbers flow from"""
    status: Literal["finished", "unfinished"]
    """unfinished: it was stopped, or is under way"""
    settings: dict[str, Any]
    """its settings as config.json has them; those of parts with a dot: `router.temperature`"""
    figures: dict[str, Any]
    """numbers and texts of summary.json, nested ones with dots; lists are left out. Empty while
    unfinished"""

    def flat(self) -> dict[str, Any]:
        """One row of `load_runs`: column -> value."""
        own = {"command": self.command, "folder": str(self.folder), "seed": self.seed,
               "status": self.status}  # fmt: skip
        settings = {f"settings.{name}": value for name, value in self.settings.items()}
        return own | settings | {f"figures.{name}": value for name, value in self.figures.items()}


@dataclass(frozen=True)
class Result:
    """What `run(config)` of a command returns."""

    folder: Path
    """the main run's; of tta and dg that of results.json and the figures"""
    rows: tuple[RunRow, ...]
    """one for each run, the main one's first"""
    model: nn.Module | None = None
    """the main run's network if it was trained by this call in this process, else None"""


def load_runs(folder: Path | str) -> pd.DataFrame:
    """All runs below a folder, such as `runs`, as a pandas DataFrame with one row for each.

    Columns: command, folder, seed, status, `settings.NAME` and `figures.NAME` (see `RunRow`), nan
    where a run has none. A run that cannot be read is left out, with a warning that names it.

    Raises:
        UserError: there is no such folder, or pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UserError("load_runs needs pandas; install it with: pip install pandas") from None
    own = ["command", "folder", "seed", "status"]
    rows = [row.flat() for row in find_runs(Path(folder))]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=own)


def find_runs(folder: Path) -> list[RunRow]:
    """All runs below a folder, sorted by folder. A run that cannot be read brings a warning.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one that holds runs, such as runs")
    rows = []
    for path in sorted(folder.rglob("config.json")):
        try:
            rows.append(read_run(path.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{path.parent} left out, it cannot be read: {reason}", stacklevel=2)
    return rows


def read_run(folder: Path) -> RunRow:
    """The run in a folder `runs_dir/command/name/seed-N`.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it cannot be read.
    """
    settings = json.loads((folder / "config.json").read_text())
    summary = folder / "summary.json"
    done = summary.is_file()
    return RunRow(
        command=_command(folder, settings["name"]),
        folder=folder,
        seed=int(settings["seed"]),
        status="finished" if done else "unfinished",
        settings=flat(settings, lists=True),
        figures=flat(json.loads(summary.read_text())) if done else {},
    )


def _command(folder: Path, name: str | None) -> str:
    """The command whose run a folder holds; a name may have folders of its own, as sweeps' do."""
    depth = len(Path(name).parts) if name else 1
    return folder.resolve().parents[depth].name


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary, `final/NAME`; nested ones with dots, lists left out."""
    return {
        f"final/{name}": float(value)
        for name, value in flat(summary).items()
        if isinstance(value, int | float)
    }


def flat(values: dict[str, Any], prefix: str = "", lists: bool = False) -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots; lists are left out unless asked for."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.", lists)
        elif lists or not isinstance(value, list):
            out[f"{prefix}{key}"] = value
    return out

"""Files that a run reads: its folder remembers them, so that runs on others are told apart.

A setting names a file or a folder, and what is in there may change while the setting stays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dynmoe.errors import UserError
from dynmoe.lab import cache

NAME = "inputs.json"
"""in a run's folder: what was read -> digest"""


def images(name: str, folder: Path | None, files: Sequence[Path]) -> dict[str, str]:
    """A data set in files; {} without any.

    Its digest changes where a file is added, removed, renamed, or of another size. Where the data
    set lies, and when it was copied there, does not count.

    Args:
        name: of the data set.
        folder: that a setting names, or None where it was searched for.
        files: of the images.
    """
    if not files:
        return {}
    states = [["/".join(path.parts[-3:]), path.stat().st_size] for path in files]
    what = f"images of {name}" if folder is None else f"images of {name} in {folder}"
    return {what: cache.digest({"files": states})}


def weights(path: Path | None) -> dict[str, str]:
    """A file of weights, if a setting names one."""
    return {} if path is None or not path.is_file() else {f"weights {path}": _content(path)}


def tables(files: Sequence[Path]) -> dict[str, str]:
    """Files of rows, by their content: a number may be corrected without a change of size."""
    return {f"rows of {path}": _content(path) for path in files}


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def known(folder: Path) -> dict[str, str]:
    """What the run of this folder read; {} where it does not say, as in runs of older versions."""
    path = folder / NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def check(folder: Path, inputs: dict[str, str]) -> None:
    """Refuse a run's folder whose run read what has changed since.

    Raises:
        UserError: names what has changed.
    """
    before = known(folder)
    for what, found in inputs.items():
        if before.get(what, found) != found:
            raise UserError(
                f"{folder} holds a run on other {what} than there are now; use another --name, or "
                "delete the folder to run it again"
            )


def check_alike(folders: Iterable[Path]) -> None:
    """Refuse to compare runs that read the same file or data set before and after a change.

    Raises:
        UserError: names two runs.
    """
    seen: dict[str, tuple[str, Path]] = {}
    for folder in folders:
        for what, found in known(folder).items():
            other, where = seen.setdefault(what, (found, folder))
            if other != found:
                raise UserError(
                    f"{where} and {folder} were run on {what} that had changed in between, so they "
                    "cannot be compared; delete the older one to run it again"
                )

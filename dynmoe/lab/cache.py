"""A folder of .npz files that saves work which can always be done again.

Nothing here may stop a run: a broken file is made again, and without a writable folder the run goes
on uncached. Each case is told in one line on stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def notice(text: str) -> None:
    """One line on stderr for something the user may want to know but need not act on."""
    print(text, file=sys.stderr)


def folder() -> Path:
    """`$XDG_CACHE_HOME/dynmoe`, or `~/.cache/dynmoe` where that variable is unset or empty."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dynmoe"


def digest(values: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 over JSON values, independent of their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def file_states(paths: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """Place, size, and times of the last change of content and of the file itself, in ns.

    As values of a `digest` they show any file that was added, removed, replaced or written to. A
    tool that keeps size and modification time (`cp -p`, `rsync -t`) still moves the last number,
    which nobody can set; so does a change of owner or mode, and the work is then done again. A file
    that is missing has zeros. 110,000 files take 3 s at most.
    """
    states = []
    for path in paths:
        place = os.path.abspath(path)
        try:
            found = os.stat(place)
        except OSError:
            states.append((place, 0, 0, 0))
        else:
            states.append((place, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return states


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], compress: bool = False) -> None:
    """Write arrays to `path` so that a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written or the disk is full; no partial file stays.
    """
    save: Any = np.savez_compressed if compress else np.savez
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            save(file, **arrays)
        os.replace(temporary, path)
    except BaseException:  # also on Ctrl-C
        Path(temporary).unlink(missing_ok=True)
        raise


def load_or_make(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays cached under `name`, or `make()`, whose result is then cached.

    `name` must hold a digest of everything that decides the arrays. A file that cannot be read is
    replaced; a folder that cannot be written is passed over. Both print one line to stderr.
    """
    path = folder() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # a damaged zip raises nearly anything, by where the damage is
        notice(f"cache: {path} cannot be read ({_reason(error)}); making it again")
    arrays = make()
    try:
        write_npz(path, arrays)
    except OSError as error:
        notice(f"cache: {path.parent} cannot be written ({_reason(error)}); going on without it")
    return arrays


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).split("\n")[0]

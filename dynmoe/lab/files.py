"""Writing files so that a crash at any moment leaves the old or the new one, never half of one."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dynmoe.errors import DynmoeError, ResourceError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Codes of a disk, or a user's share of it, without room."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, flush it to disk, rename it, flush the folder.

    Raises:
        ResourceError: the disk is full; the temporary file is gone and the old file intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in FULL:
            raise disk_full(path, len(data)) from error
        raise


def disk_full(path: Path, size: int) -> ResourceError:
    """The error for a full disk, with what is needed and what is free (bytes in, MB out)."""
    free = shutil.disk_usage(path.parent).free
    return ResourceError(
        f"disk full: writing {path.name} needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free "
        f"in {path.parent}; free some space and go on with --resume"
    )


def as_told(error: OSError) -> DynmoeError | None:
    """What to say of a file that the system would not write or read; None: a fault of ours.

    A full disk and one that fails are lacks of means (exit code 4), a folder without the right to
    write, mounted for reading only, or gone, is the user's to mend (2).
    """
    where = error.filename or "a file"
    if error.errno in FULL:
        return ResourceError(f"disk full: {where} could not be written; free some space")
    if error.errno == errno.EIO:
        return ResourceError(f"the disk fails: {where}: {error.strerror}")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(
            f"{where}: {error.strerror}; mend that, or use another folder (--runs-dir for runs)"
        )
    if error.errno == errno.ENOENT:
        return UserError(
            f"{where}: {error.strerror}; leave files and folders in their place while they are in "
            "use, and start it again"
        )
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """The same plain value with null for nan and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make the folder of a report where it is missing, and clear it of such temporary files.

    Raises:
        DynmoeError: it cannot be made, for instance as there is a file in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_told(error) or UserError(
            f"cannot make {folder}: {error.strerror}; use another folder"
        ) from None
    remove_leftovers(folder)


def lock(folder: Path) -> IO[str]:
    """Lock a folder; closing the file frees it, and the kernel does so however this process ends.

    Raises:
        UserError: another process holds it.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "?"
        file.close()
        raise UserError(
            f"{folder} is in use by process {owner}; wait for it, or use another --name"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a folder of results, made where it is missing, while they are worked out.

    Raises:
        UserError: another process does so.
    """
    make_folder(folder)
    with lock(folder):
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: plain dicts of tensors and values, written atomically, with a checksum each.

`step-000000123.pt` can be read with `torch.load(path, weights_only=True)`. The file beside it,
`.pt.sha256`, is written first, and while a checkpoint is replaced it holds the checksums of both:
a process killed at any moment leaves only whole checkpoints. The newest two are kept.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab.files import remove_leftovers, write_atomic

KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint and delete all but the newest `KEEP`.

    A later step than this one can only be damaged, passed over by `load_latest`: it goes first.

    Raises:
        UserError: the state holds more than tensors and plain values, so it could not be loaded.
        ResourceError: disk full, also after the oldest checkpoint made room; the newest stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = _packed(state)
    if not _is_plain(buffer):
        place, kind = _other(state)
        raise UserError(
            f"the run cannot be saved: {place} is a {kind}, which could not be loaded again; a "
            "part of your own may save numbers, strings, lists, dicts and tensors (a deque as a "
            "list)"
        )
    data = buffer.getvalue()
    path = folder / f"step-{step:09d}.pt"
    for later in folder.glob("step-*.pt"):
        if later.name > path.name:
            _remove(later)
    try:
        _write(path, data)
    except ResourceError:
        older = [p for p in _complete(folder) if p != path]
        if len(older) < 2:
            raise
        _remove(older[0])
        _write(path, data)
    for old in _complete(folder)[:-KEEP]:
        _remove(old)
    return path


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, its tensors on the CPU, or None if there is none.

    A damaged one is named on stderr and passed over for the one before it.

    Raises:
        ResourceError: there are checkpoints and none of them can be read, or the newest holds code.
    """
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    paths = sorted(folder.glob("step-*.pt"))
    for path in reversed(paths):
        data = path.read_bytes()
        if _checksum(data) in _known_checksums(path):
            return _unpacked(path, data)
        print(f"warning: checkpoint {path} is damaged; trying the one before", file=sys.stderr)
    if paths:
        raise ResourceError(
            f"no checkpoint in {folder} can be read; delete that folder to start over"
        )
    return None


def load(path: Path) -> dict[str, Any]:
    """The checkpoint in one file, its tensors on the CPU.

    Raises:
        ResourceError: it cannot be read, is damaged, or holds code.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResourceError(f"cannot read checkpoint {path}: {error.strerror}") from None
    if _checksum(data) not in _known_checksums(path):
        raise ResourceError(f"checkpoint {path} is damaged: it does not match its .sha256 file")
    return _unpacked(path, data)


def exists(folder: Path) -> bool:
    """Whether the folder holds any checkpoint, damaged or not."""
    return folder.is_dir() and any(folder.glob("step-*.pt"))


def _write(path: Path, data: bytes) -> None:
    checksum, replaced = _checksum(data), _known_checksums(path)
    write_atomic(_checksum_file(path), "\n".join([*replaced, checksum]).encode())
    write_atomic(path, data)
    if replaced:
        write_atomic(_checksum_file(path), checksum.encode())


def _packed(state: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def _is_plain(packed: io.BytesIO) -> bool:
    return not torch.serialization.get_unsafe_globals_in_checkpoint(packed)


def _other(state: Any) -> tuple[str, str]:
    """Dotted keys and type of the first value that is neither a tensor nor plain."""
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, Mapping):
        inside = state.items()
    elif isinstance(state, list | tuple):
        inside = enumerate(state)
    for key, value in inside:
        if not _is_plain(_packed(value)):
            place, kind = _other(value)
            return f"{key}.{place}".rstrip("."), kind
    return "", type(state).__name__


def _unpacked(path: Path, data: bytes) -> dict[str, Any]:
    """Tensors and plain values alone: nothing in the file is run as code."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ResourceError(
            f"checkpoint {path} holds more than tensors and plain values, so it was not made by "
            "dynmoe; it is not loaded, as it could run code"
        ) from None


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _known_checksums(path: Path) -> list[str]:
    """What the checksum of a checkpoint may be; none if the file for it is missing."""
    file = _checksum_file(path)
    return file.read_text(errors="replace").split() if file.is_file() else []


def _complete(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("step-*.pt")) if _checksum_file(p).is_file()]


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _checksum_file(path).unlink(missing_ok=True)

"""Arrays in the cache folder that are filled row by row: what is dear to compute is computed once.

One file per array, such as the features of all images of a domain. A row stands beside a checksum
of its values, so that a row which was never written, or was cut off by an interruption, is made
again and never used half; several processes may fill one file. Nothing here may stop a run, as in
`dynmoe.lab.cache`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.lab import cache

Make = Callable[[list[int]], np.ndarray]


class KeptRows:
    """The rows [N, ...] of one array.

    Rows are made in blocks of fixed places, so that a row's values do not depend on which others
    were there before.

    Args:
        name: of the file; it must hold a digest of everything that decides the values.
        count: N.
        shape: of a row.
        dtype: of its values.
        block: rows that are made together.
    """

    def __init__(
        self, name: str, count: int, shape: tuple[int, ...], dtype: type, block: int = 1
    ) -> None:
        self.path = cache.folder() / f"{name}.npy"
        self.count, self.block = count, block
        self.record = np.dtype([("sum", "u8"), ("values", np.dtype(dtype), shape)])
        self._file: np.ndarray | None = None
        self._writes = True

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles open the file for themselves."""
        return {**self.__dict__, "_file": None}

    def rows(self, indices: Sequence[int], make: Make) -> np.ndarray:
        """The rows at `indices`, [n, ...]: from the file, and the others from `make`.

        Args:
            indices: places from 0 to N - 1.
            make: places of whole blocks, sorted -> their rows, at most `block` at a time.
        """
        file = self._opened()
        found = np.empty(len(indices), self.record)
        if file is not None:
            found = file[np.asarray(indices, dtype=np.int64)]
        missing = {i // self.block for i, one in zip(indices, found, strict=True)
                   if file is None or not _sound(one)}  # fmt: skip
        made: dict[int, np.ndarray] = {}
        for number in sorted(missing):
            begin = number * self.block
            places = list(range(begin, min(begin + self.block, self.count)))
            made.update(zip(places, self._keep(places, make(places)), strict=True))
        values = found["values"]
        for row, i in enumerate(indices):
            if i in made:
                values[row] = made[i]
        return values

    def _keep(self, places: list[int], values: np.ndarray) -> np.ndarray:
        """Write rows, if there is a file; them, in the array's dtype."""
        records = np.empty(len(places), self.record)
        records["values"] = values
        records["sum"] = [_checksum(one) for one in records["values"]]
        if self._writes and self._file is not None:
            self._write(places[0], records)
        return records["values"]

    def _write(self, place: int, records: np.ndarray) -> None:
        """Write records from this place on; a full disk ends all writing, and no more."""
        file = self._file
        assert isinstance(file, np.memmap)
        try:  # not through the map, where a full disk would kill the process
            with self.path.open("r+b") as handle:
                handle.seek(file.offset + place * self.record.itemsize)
                handle.write(records.tobytes())
        except OSError as error:
            self._writes = False
            cache.notice(f"cache: {self.path} cannot be written ({error}); going on without it")

    def _opened(self) -> np.ndarray | None:
        """The file, made if it is not there; None, with a notice, where that cannot be."""
        if self._file is None:
            try:
                self._file = self._open()
            except (OSError, ValueError) as error:
                cache.notice(f"cache: {self.path} cannot be used ({error}); going on without it")
        return self._file

    def _open(self) -> np.ndarray:
        try:
            return self._mapped()
        except FileNotFoundError:
            pass
        except ValueError as error:  # no such array: a damaged file, or one of another make
            cache.notice(f"cache: {self.path} cannot be read ({error}); making it again")
            self.path.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        os.close(handle)
        try:
            np.lib.format.open_memmap(temporary, "w+", self.record, (self.count,))  # sparse
            os.link(temporary, self.path)  # not replaced: another process may fill it already
        except FileExistsError:
            pass
        finally:
            Path(temporary).unlink(missing_ok=True)
        return self._mapped()

    def _mapped(self) -> np.ndarray:
        file = np.lib.format.open_memmap(self.path, "r")
        if file.dtype != self.record or file.shape != (self.count,):
            raise ValueError("it holds another array")
        return file


def _checksum(values: np.ndarray) -> int:
    """Of a row's bytes; never 0, which stands in rows that were never written."""
    digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _sound(record: Any) -> bool:
    """Whether a row's checksum is that of its values."""
    return int(record["sum"]) != 0 and int(record["sum"]) == _checksum(record["values"])

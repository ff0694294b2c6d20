"""Mirrors: copies of a run's log, `--mirror wandb mlflow tensorboard`.

A mirror follows `log.jsonl` from a thread of its own, so that a store that is slow or gone cannot
hold up a run: it costs one line of warning. How many lines were sent is kept in the run's folder,
`mirror-NAME.json`, with the store's own name of the run: a run that goes on goes on there, too. A
resumed run writes the same lines again, so nothing is sent twice.

Where the copies go is the store's own affair: WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY ...;
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError, unknown
from dynmoe.lab.files import write_json
from dynmoe.lab.stores import STORES, Store

POLL_S = 2.0
"""Between two looks at the log."""
PATIENCE_S = 30.0
"""That a run waits, at its end, for all to be sent."""
LINES = 500
"""Sent at a time."""


def check_mirrors(names: Iterable[str]) -> None:
    """Refuse mirrors that there are not.

    Raises:
        UserError: an unknown name, one named twice, or its package is not installed.
    """
    names = list(names)
    for name in names:
        if name not in STORES:
            raise unknown("mirror", name, STORES)
        if names.count(name) > 1:
            raise UserError(f"--mirror names {name} twice; name each once")
        if find_spec(STORES[name].package) is None:
            raise UserError(
                f"--mirror {name} needs {STORES[name].package}, not installed here; "
                f"run: pip install 'dynmoe[{name}]'"
            )


class Mirror:
    """Copies one run's log into one store, from a thread.

    Args:
        store: where.
        name: the store's.
        folder: the run's; has `log.jsonl`.
        title: shown to people.
        settings: flat.
    """

    def __init__(
        self, store: Store, name: str, folder: Path, title: str, settings: dict[str, Any]
    ) -> None:
        self.store, self.name, self.folder = store, name, folder
        self.title, self.settings = title, settings
        self.file = folder / f"mirror-{name}.json"
        self.final: dict[str, float] | None = None
        self._ends, self._given_up = threading.Event(), False
        self._place, self._passed, self._sent = 0, 0, 0  # bytes and lines read, lines sent
        self._thread = threading.Thread(target=self._work, name=f"mirror {name}", daemon=True)
        self._thread.start()

    def finished(self, figures: dict[str, float]) -> None:
        """The run is done, with these figures."""
        self.final = figures

    def close(self) -> None:
        """Send the rest, and wait for it, but not for long; the log must be on the disk."""
        self._ends.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._given_up = True
            self._warn(f"not all was sent within {PATIENCE_S:.0f} s")

    def _work(self) -> None:
        try:
            known, self._sent = self._known()
            known = self.store.open(known, self.folder, self.title, self.settings)
            self._keep(known)
            last = False
            while not last:
                last = self._ends.wait(POLL_S)
                while not self._given_up and (lines := self._lines()):
                    self.store.send([numbers(line) for line in lines])
                    self._sent += len(lines)
                    self._keep(known)
            self.store.close(self.final)
        except BaseException as error:  # whatever a store's package raises, exits included
            reason = (str(error).strip().split("\n")[0] or "no reason given")[:200]
            if not self._given_up:
                self._warn(f"{type(error).__name__}: {reason}")

    def _known(self) -> tuple[str | None, int]:
        """The store's name of the run and the lines sent, from an earlier session."""
        try:
            kept = json.loads(self.file.read_text())
            return str(kept["run"]), int(kept["lines"])
        except (OSError, ValueError, LookupError, TypeError):
            return None, 0

    def _keep(self, known: str) -> None:
        write_json(self.file, {"run": known, "lines": self._sent})

    def _lines(self) -> list[dict[str, Any]]:
        """At most LINES whole lines of the log that were not read or sent before."""
        found: list[dict[str, Any]] = []
        with open(self.folder / "log.jsonl", "rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):  # the rest is still to be written
                    break
                self._place += len(line)
                self._passed += 1
                if self._passed > self._sent:
                    found.append(json.loads(line))
                if len(found) == LINES:
                    break
        return found

    def _warn(self, reason: str) -> None:
        print(
            f"warning: mirror {self.name} of {self.folder} stopped ({reason}); the run and its own "
            "log do not depend on it",
            file=sys.stderr,
        )


def numbers(line: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Step and numbers of a line of the log; those of an event are called `event/NAME/...`."""
    event = line.get("event")
    prefix = "" if event is None else f"event/{event}/"
    found = {
        f"{prefix}{tag}": float(value)
        for tag, value in line.items()
        if tag not in ("step", "event") and isinstance(value, int | float)
    }
    return int(line["step"]), found


def start_mirrors(
    names: Iterable[str], folder: Path, title: str, settings: dict[str, Any]
) -> list[Mirror]:
    """The mirrors of a run, at work."""
    return [Mirror(STORES[name](), name, folder, title, settings) for name in names]

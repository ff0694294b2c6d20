"""The ways a command may end early, each with its exit code.

A command never shows a traceback for something the user can mend: it raises one of these with a
single line that names the bad value, what is allowed and how to fix it.
"""

import difflib
from collections.abc import Iterable


class DynmoeError(Exception):
    """Base of every error that a command reports as one line; `exit_code` is its status."""

    exit_code = 1


class UserError(DynmoeError):
    """Bad input: an unknown name, a wrong folder, a setting that cannot work."""

    exit_code = 2


class NumericError(DynmoeError):
    """The loss or a gradient is no longer finite; the last good checkpoint is kept."""

    exit_code = 3


class ResourceError(DynmoeError):
    """Out of disk or memory; what was written before is intact."""

    exit_code = 4


class Pruned(DynmoeError):  # noqa: N818 - not an error
    """A search has stopped a run that does worse than earlier ones; its checkpoints are kept."""

    exit_code = 5


class Interrupted(DynmoeError):  # noqa: N818 - not an error
    """Stopped by a signal after saving; the run can be resumed. Exit code 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unknown(what: str, value: str, known: Iterable[str], more: str = "") -> UserError:
    """The error for a name that is none of `known`, with the nearest of them suggested.

    Args:
        what: the kind of thing that is named.
        value: the name that was given.
        known: what it may be.
        more: a sentence that is added.
    """
    known = list(known)
    near = difflib.get_close_matches(value, known, n=1)
    parts = [f"unknown {what} {value!r}; known: {', '.join(known)}."]
    parts += [f"Did you mean {near[0]!r}?"] if near else []
    return UserError(" ".join([*parts, more]).strip())

"""Launchers: where many independent pieces of work are carried out. A run is such a piece.

`Local` has processes of this machine. A launcher calls `work(item)` for each item, somewhere, and
says of each how it ended. It knows nothing of runs: what a piece of work saves, and how it goes on
when it is given out a second time, is its own affair.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dynmoe.errors import ResourceError, UserError
from dynmoe.registry import load_own_parts

KILLED = "its process was killed, perhaps as memory ran out; start it again to go on"


@dataclass(frozen=True)
class Failure:
    """Why a piece of work did not end well."""

    message: str
    """one line for the user"""
    exit_code: int
    """that of the error, see `dynmoe.errors`"""


Work = Callable[[Any], Failure | None]
"""What is done with an item: a function of a module, as other processes must find it"""
Outcome = tuple[Any, Failure | None]
"""An item, and how its work ended; None: well"""


class Launcher(ABC):
    """Base of all launchers. Subclasses are frozen dataclasses of their options.

    Attributes:
        jobs: runs at a time.
    """

    jobs: int

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Refuse, before any work is done, what cannot be used here.

        Raises:
            UserError: an engine that is not installed, a cluster that cannot be reached.
        """

    @abstractmethod
    def launch(self, work: Work, items: list[Any]) -> Generator[Outcome, None, None]:
        """Carry out `work(item)` for all items; each is given back when it has ended.

        Closing the iterator waits for what is under way and begins nothing more.
        """

    def stop(self) -> None:  # noqa: B027 - most have nothing to tell
        """SIGTERM came to this process alone: have all that is under way save and end."""


@dataclass(frozen=True)
class Local(Launcher):
    """Processes of this machine."""

    jobs: int = 1
    """runs at a time"""

    def launch(self, work: Work, items: list[Any]) -> Generator[Outcome, None, None]:
        """One process per place, used again; that of a killed run is made anew."""
        waiting = deque(items)
        free = [_process() for _ in range(min(self.jobs, len(items)))]
        busy: dict[Future[Failure | None], tuple[Any, ProcessPoolExecutor]] = {}
        try:
            while waiting or busy:
                while waiting and free:
                    item, process = waiting.popleft(), free.pop()
                    with _interrupts(signal.SIG_BLOCK):  # a process that begins inherits this
                        busy[process.submit(_interruptible, work, item)] = item, process
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    item, process = busy.pop(future)
                    failure = None
                    try:
                        failure = future.result()
                    except BrokenProcessPool:
                        failure = Failure(KILLED, ResourceError.exit_code)
                        process.shutdown()
                        process = _process()
                    free.append(process)
                    yield item, failure
        finally:
            for process in [*free, *(process for _, process in busy.values())]:
                process.shutdown()

    def stop(self) -> None:
        """Pass the signal on."""
        for process in multiprocessing.active_children():
            process.terminate()


def _process() -> ProcessPoolExecutor:
    """A process that begins with its first item; torch's threads do not survive a fork."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)


@contextmanager
def _interrupts(how: int) -> Iterator[None]:
    """Hold back Ctrl-C's signal in this thread (SIG_BLOCK), or let it come (SIG_UNBLOCK)."""
    before = signal.pthread_sigmask(how, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interruptible(work: Work, item: Any) -> Failure | None:
    """Do the work. Only now Ctrl-C is heard: before, it would end imports with a traceback."""
    with _interrupts(signal.SIG_UNBLOCK):
        return work(item)


def _begin() -> None:
    """In a process of `Local`, before its first item."""
    load_own_parts()  # an item may hold some, and could not be unpickled
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, even killed, lest it go on and keep runs locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def installed(package: str, extra: str) -> None:
    """Refuse an engine that is not there.

    Raises:
        UserError: it is not installed; the line names the extra that brings it.
    """
    if find_spec(package) is None:
        raise UserError(
            f"this launcher needs {package}, not installed here; run: pip install 'dynmoe[{extra}]'"
        )

"""Commands that are killed at random moments, again and again; what they leave is counted.

A kill is SIGKILL to a process of its own, after a random part of the processor time that the whole
run needs: so where it falls does not depend on what else the machine does. Just before it the
process writes down, in a signal handler, where it is.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from dynmoe.errors import DynmoeError, ResourceError
from dynmoe.lab import checkpoint
from dynmoe.lab.config import run_command

IN_A_ROW = 5
"""Kills of one run, or sweep, at most; then it is left alone until it ends."""
WAIT_S = 1800
TICKS = os.sysconf("SC_CLK_TCK")
MOMENTS = ("start", "step", "growth", "save", "end", "between")
PRELOAD = [
    "dynmoe.cl", "dynmoe.rl", "dynmoe.sweep", "agents.experiment", "gymnasium", "scipy",
    "dynmoe.experiments.tta.experiment", "dynmoe.experiments.dg.experiment",
    "timm.models.vision_transformer", "cl_benchmarks.experiment", "cl_benchmarks.trainer",
    "sklearn.datasets", "torch.utils.tensorboard", "matplotlib.backends.backend_agg",
]  # fmt: skip
PART = """
import faulthandler, os, signal
faulthandler.register(signal.SIGUSR1, open(f"{TRACES}/{os.getpid()}", "w"), all_threads=False)
"""
"""Loaded as a part of one's own by the processes of a sweep, wherever they are."""


@dataclass(frozen=True)
class World:
    """A command line that takes few seconds and saves after each step."""

    name: str
    module: str
    flags: str
    share: float
    """of all kills"""
    sweep: bool = False


@dataclass
class Count:
    """What was found."""

    kills: Counter[str] = field(default_factory=Counter)
    """by moment"""
    workers: int = 0
    """kills of a process that a sweep had started, not of the sweep"""
    damaged: int = 0
    runs: int = 0
    unreadable: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """of processor time"""

    @property
    def faults(self) -> list[str]:
        return [*self.unreadable, *self.stuck, *self.different]


def table(counts: dict[str, Count]) -> str:
    """A row per command, in Markdown."""
    heads = ["command", "kills", *MOMENTS, "checkpoints damaged too", "ended", "unreadable",
             "can't go on", "differ", "core-minutes"]  # fmt: skip
    rows: list[list[Any]] = [heads, ["---"] * len(heads)]
    whole = Count()
    for name, one in [*counts.items(), ("all", whole)]:
        rows.append(
            [name, one.kills.total(), *(one.kills[m] for m in MOMENTS), one.damaged, one.runs,
             len(one.unreadable), len(one.stuck), len(one.different), f"{one.seconds / 60:.1f}"]
        )  # fmt: skip
        whole.kills += one.kills
        for total in ("damaged", "runs", "unreadable", "stuck", "different", "seconds"):
            setattr(whole, total, getattr(whole, total) + getattr(one, total))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def forks() -> BaseContext:
    """Starts processes that have imported everything: forks of a clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _carry_out(module: str, argv: list[str], traces: Path, output: Path) -> None:
    """In the process that may be killed."""
    os.environ["DYNMOE_PARTS"] = str(traces / "tracer.py")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else they starve
    trace = os.open(traces / str(os.getpid()), os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    run_command(import_module(module).main, argv)


class Player:
    """Runs one world again and again in `folder`, killing it until `kills` are counted."""

    def __init__(self, world: World, processes: Any, folder: Path, kills: int, seed: int) -> None:
        self.world, self.processes, self.folder, self.kills = world, processes, folder, kills
        self.generator, self.count = random.Random(f"{world.name} {seed}"), Count()
        self.spoilt: dict[Path, bytes] = {}
        self.traces = folder / "traces"
        self.traces.mkdir(parents=True)
        (self.traces / "tracer.py").write_text(PART.replace("{TRACES}", str(self.traces), 1))

    def play(self) -> Count:
        whole, _ = self._session(self.folder / "whole", None)
        assert whole == 0, (self.folder / "output.txt").read_text()
        usual, self.count.seconds = self.count.seconds, 0.0
        while self.count.kills.total() < self.kills:
            runs = self.folder / f"killed-{self.count.runs}"
            own, code = 0, None
            while code != 0:
                last = own >= IN_A_ROW or self.count.kills.total() >= self.kills
                code, done = self._session(runs, None if last else usual)
                own += done
                if code == ResourceError.exit_code and self._ray_did_not_start():
                    continue
                if code not in (None, 0) and not (code == ResourceError.exit_code and done):
                    self.count.stuck.append(f"{runs.name}: exit code {code} after {own} kills")
                    break
            if code == 0:
                self._compare(self.folder / "whole", runs)
            self.count.runs += 1
            print(f"{self.world.name}: {dict(self.count.kills)} {self.count.faults}", flush=True)
        return self.count

    def _ray_did_not_start(self) -> bool:
        """Ray gives itself 30 s, little on a busy machine: such a sweep is repeated."""
        lines = (self.folder / "output.txt").read_text().splitlines()
        return bool(lines) and lines[-1].startswith("error: Ray does not start here")

    def _session(self, runs: Path, usual: float | None) -> tuple[int | None, int]:
        """Start it; its exit code, None if it was killed, and how many kills there were.

        Workers of a sweep may be killed, too: it goes on without them.
        """
        own, dashes, of_runs = self.world.flags.partition(" -- ")
        argv = [*own.split(), "--runs-dir", str(runs), *dashes.split(), *of_runs.split()]
        args = (self.world.module, argv, self.traces, self.folder / "output.txt")
        process = self.processes.Process(target=_carry_out, args=args)
        process.start()
        done, began, used = 0, time.monotonic(), 0.0
        limit = self.generator.uniform(0.02, 1.0) * usual if usual else None
        while process.exitcode is None:
            assert time.monotonic() - began < WAIT_S, "it does not end"
            used = max(used, self._used(process.pid))
            if limit is not None and used >= limit:
                time.sleep(self.generator.uniform(0, 0.03))  # waits for the disk use no time
                done += self._kill(process, runs)
                self._check(runs)
                if process.exitcode is not None:
                    break
                enough = done >= 2 or self.count.kills.total() >= self.kills
                limit = None if enough or usual is None else used + self.generator.random() * usual
            process.join(0.01 if limit is not None and not self.world.sweep else 0.1)
        process.join()
        self.count.seconds += used
        return (None if process.exitcode == -signal.SIGKILL else process.exitcode), done

    def _used(self, pid: int) -> float:
        """Processor time, with that of the processes it has started."""
        known = _processes() if self.world.sweep else {pid: _stat(pid)}
        pids = _tree(pid, known) if self.world.sweep else [pid]
        return sum(known[p][2] for p in pids if known.get(p))

    def _kill(self, process: Any, runs: Path) -> bool:
        """Kill the command, or one of a sweep's workers; False if it had just ended."""
        workers = _holders(runs) if self.world.sweep else []
        if workers and self.generator.random() < 0.5:
            place = self._killed(self.generator.choice(workers))
            self.count.kills.update([place] if place else [])
            self.count.workers += bool(place)
            return bool(place)
        family = _tree(process.pid, _processes())
        place = self._killed(process.pid)
        process.join()
        if not place or process.exitcode != -signal.SIGKILL:
            return False
        self.count.kills[place] += 1
        if "submitit" in self.world.name:  # its jobs run on: they are killed too, or waited for
            too = self.generator.random() < 0.5
            for pid in family[1:] if too else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._wait(lambda: not any(_stat(pid) for pid in family[1:]))
        self._wait(lambda: not _holders(runs))
        return True

    def _wait(self, ended: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not ended():
            assert time.monotonic() - began < WAIT_S, "what it started does not end"
            time.sleep(0.05)

    def _killed(self, pid: int) -> str:
        """Kill a process; the moment at which it was, "" if it had ended."""
        trace = self.traces / str(pid)
        try:
            if trace.exists():
                os.kill(pid, signal.SIGUSR1)
                began = time.monotonic()
                while not trace.stat().st_size and time.monotonic() - began < 0.1:
                    time.sleep(0.0005)
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return ""
        text = trace.read_text() if trace.exists() else ""
        trace.unlink(missing_ok=True)
        return moment(text)

    def _check(self, runs: Path) -> None:
        """Every checkpoint can be read; then spoil one at times."""
        folders = [f for f in runs.rglob("checkpoints") if not (f.parent / "summary.json").exists()]
        for path in (p for folder in folders for p in folder.glob("step-*.pt")):
            try:
                checkpoint.load(path)
            except DynmoeError as error:
                gone = not path.exists()  # another worker of the sweep goes on
                if not gone and self.spoilt.get(path) != path.read_bytes():
                    self.count.unreadable.append(f"{path}: {error}")
        idle = [f for f in folders if not self.world.sweep or not _holders(f.parent)]
        if idle and self.count.kills.total() % 3 == 0:
            self._damage(self.generator.choice(sorted(idle)))

    def _damage(self, folder: Path) -> None:
        """Cut the newest checkpoint off or turn one of its bits, unless it is the only one."""
        paths = sorted(folder.glob("step-*.pt"))
        if len(paths) < 2:
            return
        data = bytearray(paths[-1].read_bytes())
        if self.generator.random() < 0.5:
            del data[self.generator.randrange(len(data)) :]
        elif data:
            data[self.generator.randrange(len(data))] ^= 1 << self.generator.randrange(8)
        paths[-1].write_bytes(data)
        self.spoilt[paths[-1]] = bytes(data)
        self.count.damaged += 1

    def _compare(self, one: Path, two: Path) -> None:
        names = ("log.jsonl", "summary.json", "results.json")
        files = [sorted(p.relative_to(f) for n in names for p in f.rglob(n)) for f in (one, two)]
        if files[0] != files[1]:
            self.count.different.append(f"{two.name}: {files[1]} instead of {files[0]}")
        for file in files[0]:
            if not (two / file).exists() or (one / file).read_bytes() != (two / file).read_bytes():
                self.count.different.append(f"{two.name}: {file}")
        if list(two.rglob(".*.tmp")):
            self.count.different.append(f"{two.name}: temporary files")


def moment(trace: str) -> str:
    """What a process was at, from the functions that it was in."""
    frames = re.findall(r'File "(.*)", line \d+ in (\S+)', trace)
    called = {name for _, name in frames}
    files = " ".join(path for path, _ in frames)
    waits = any(f"/lab/{name}.py" in files for name in ("launchers", "engines", "slurm"))
    if waits and "carry_out" not in called:
        return "between"  # a sweep, while its runs are elsewhere
    if "/lab/checkpoint.py" in files:
        return "save"
    if "/dynmoe/growth/" in files and "work" in called:
        return "growth"
    if "work" in called:
        return "step"
    if called & {"summary", "finish", "finished", "report", "_report", "hparams"}:
        return "end"
    return "start"


def _holders(runs: Path) -> list[int]:
    """The processes that hold a run's folder, by the kernel's list: to try would be to hold it."""
    inodes = {path.stat().st_ino for path in runs.rglob("seed-*/.lock")}
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    held = [(int(f[4]), int(f[5].split(":")[2])) for f in locks if f[1] == "FLOCK"]
    return sorted(pid for pid, inode in held if inode in inodes)


def _stat(pid: int) -> tuple[int, str, float] | None:
    """Parent, state and seconds of processor time; None for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    parts = text.rpartition(")")[2].split()
    if parts[0] == "Z":
        return None
    return int(parts[1]), parts[0], sum(map(int, parts[11:13])) / TICKS


def _processes() -> dict[int, tuple[int, str, float]]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {pid: stat for pid in pids if (stat := _stat(pid))}


def _tree(pid: int, known: dict[int, tuple[int, str, float]]) -> list[int]:
    """A process and all that it, and they, have started."""
    found = [pid]
    for parent in found:
        found += [p for p, stat in known.items() if stat[0] == parent]
    return found


def differing(one: Path, two: Path) -> list[str]:
    """For a look at a difference: the keys of two results that are not equal."""
    a, b = (json.loads(path.read_text()) for path in (one, two))
    return [key for key in a if a[key] != b.get(key)]

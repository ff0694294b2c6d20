"""`dynmoe doctor`: what of this machine dynmoe can use, what is missing, and what to do about it.

One line per check: ok, note (something is missing that the default commands do not need) or
problem (a default command would stop). Exit code 1 if there is a problem, else 0. Nothing is
downloaded, and no file stays. It needs python alone, so that it can tell what else is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from dynmoe.commands import TOP, place_of
from dynmoe.doctor_data import data_checks
from dynmoe.errors import UserError
from dynmoe.lab.config import run_command

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 11)
EXTRAS = {
    "lab": "all commands: settings, tables, figures, TensorBoard",
    "cl": "`dynmoe cl`, continual learning",
    "rl": "`dynmoe rl`, reinforcement learning on Craftax, videos",
    "tta": "`dynmoe tta`, test-time adaptation",
    "dg": "`dynmoe dg`, domain generalisation",
    "search": "`dynmoe search`",
    "slurm": "`--launcher submitit`",
    "ray": "`--launcher ray`",
    "hub": "`dynmoe export --push`, `load_from_hub`",
    "wandb": "`--mirror wandb`",
    "mlflow": "`--mirror mlflow`",
    "lightning": "callbacks for Lightning",
    "transformers": "callbacks for Hugging Face's Trainer",
}
"""Extra of the package -> what it is for."""
IMPORTED_AS = {
    "avalanche-lib": "avalanche",
    "imagecorruptions-imaug": "imagecorruptions",
    "mlflow-skinny": "mlflow",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
"""Package as it is installed -> as it is imported, where the names differ."""
ENOUGH_DISK, LITTLE_DISK, LITTLE_MEMORY = 5.0, 0.5, 2.0
"""GB. The cache of Tiny ImageNet alone takes 1.4 on the disk."""

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    state: State
    text: str
    """what was found and, unless it is ok, what to do"""


@dataclass(frozen=True)
class Requirement:
    """A package that an extra brings."""

    extra: str
    """empty for what dynmoe always needs"""
    package: str
    """its name for pip"""
    minimum: str
    """the least version; empty for any"""


def main(argv: list[str]) -> None:
    """Print what each check finds; exit code 1 if there is a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m dynmoe.doctor", allow_abbrev=False,
        description=(__doc__ or "").split("\n\n", 1)[1],
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR",
                        help="where data sets are looked for (data)")  # fmt: skip
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR",
                        help="where runs are to be written (runs)")  # fmt: skip
    parser.add_argument("--imports", action="store_true",
                        help="import every optional package, too: 15 s or more")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(f"unknown option {rest[0]}; --help lists all options")
    findings = []
    for finding in examine(options.data_dir, options.runs_dir, options.imports):
        findings.append(finding)
        print(f"{finding.state:8} {finding.text}", flush=True)
    count = {s: sum(f.state == s for f in findings) for s in ("problem", "note")}
    if count["problem"]:
        print(f"\n{_plural(count['problem'], 'problem')} to solve first (see above)")
        sys.exit(1)
    print(f"\nready: no problem, {_plural(count['note'], 'note')}; try: dynmoe cl --preset minute")


def examine(data_dir: Path, runs_dir: Path, imports: bool = False) -> Iterator[Finding]:
    """All checks in order. A check that itself fails is told as a problem, and the next follow."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        lambda: check_packages(requirements(), imports),
        check_devices,
        lambda: (Finding(state, text) for state, text in data_checks(data_dir.expanduser())),
        check_cache,
        lambda: check_runs(runs_dir.expanduser()),
        check_memory,
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding("problem", f"a check failed: {reason(error)}")


def check_python() -> Iterator[Finding]:
    """Python's version, and that no folder of the user's hides packages of ours."""
    version, least = platform.python_version(), ".".join(map(str, PYTHON))
    if sys.version_info < PYTHON:
        yield Finding("problem", f"Python {version} is too old; install {least} or newer")
    else:
        yield Finding("ok", f"Python {version} in {sys.prefix}")
    for package in TOP:
        where = place_of(package)
        if where is not None and where != ROOT / package:
            yield Finding(
                "problem", f"{where} hides dynmoe's own package {package}; rename it, or start "
                "from another folder")  # fmt: skip


def requirements() -> list[Requirement]:
    """What dynmoe needs: from the checkout's pyproject.toml, or as it was installed."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text())["project"]
        lines = [("", line) for line in table["dependencies"]]
        extras = table["optional-dependencies"]
        lines += [(extra, line) for extra, own in extras.items() for line in own]
    else:
        lines = []
        for line in metadata.requires("dynmoe") or ():
            of = re.search(r"extra == [\"'](\w+)[\"']", line)
            lines.append((of[1] if of else "", line))
    out = []
    for extra, line in lines:
        found = re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", line)
        if found and found[1] != "dynmoe" and extra in ("", *EXTRAS):
            out.append(Requirement(extra, found[1], found[2] or ""))
    return out


def check_packages(needed: list[Requirement], imports: bool = False) -> Iterator[Finding]:
    """torch and what else is always needed, then one line per extra.

    Args:
        needed: what dynmoe and its extras need.
        imports: import every package, and not only torch and numpy; a package that is installed
            and broken shows only then.
    """
    missing = []
    for one in needed:
        if not one.extra:
            fault = fault_of(one, True)
            how = f"pip install '{one.package}>={one.minimum}'"
            if fault:
                missing.append(one.package)
                yield Finding("problem", f"{one.package} {fault}; {how}")
            else:
                yield Finding("ok", f"{one.package} {metadata.version(one.package)}")
    for extra, purpose in EXTRAS.items():
        own = [one for one in needed if one.extra == extra]
        absent = [one.package for one in own if not installed(one.package)]
        pip = f"pip install 'dynmoe[{extra}]'"
        if absent:
            state: State = "problem" if extra == "lab" else "note"
            yield Finding(state, f"{extra}: {', '.join(absent)} not installed, needed for "
                          f"{purpose}; {pip}")  # fmt: skip
        faults = {
            one.package: fault_of(one, imports and not missing)
            for one in own
            if one.package not in absent
        }
        faults = {package: fault for package, fault in faults.items() if fault}
        for package, fault in faults.items():
            yield Finding("problem", f"{extra}: {package} {fault}, needed for {purpose}; "
                          f"pip install --force-reinstall {package}, or {pip}")  # fmt: skip
        if own and not absent and not faults:
            yield Finding("ok", f"{extra}: {purpose}")


def installed(package: str) -> bool:
    """Whether pip knows the package here."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def fault_of(one: Requirement, imported: bool) -> str:
    """What is wrong with a package, in a few words; empty if nothing is."""
    if not installed(one.package):
        return "is not installed"
    version = metadata.version(one.package)
    if one.minimum and _numbers(version) < _numbers(one.minimum):
        return f"{version} is too old ({one.minimum} or newer is needed)"
    if imported:
        try:
            import_module(IMPORTED_AS.get(one.package, one.package))
        except Exception as error:
            return f"{version} is installed but cannot be imported ({reason(error)})"
    return ""


def check_devices() -> Iterator[Finding]:
    """CPU cores, torch's threads and CUDA devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch: Any = import_module("torch")
    except Exception:  # told among the packages
        yield Finding("ok", f"{cores} CPU cores")
        return
    threads, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} CPU cores, {_plural(threads, 'thread')} of torch"
    if cores and threads > cores:
        yield Finding("note", f"{text}: more threads than cores are slow; use --threads {cores}")
    else:
        yield Finding("ok", text + (f" (OMP_NUM_THREADS={wanted})" if wanted else ""))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            size = card.total_memory / 1e9
            yield Finding("ok", f"cuda:{index} is {card.name} with {size:.0f} GB; used by default")
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Finding("note", "there is an NVIDIA driver, but torch is built for the CPU alone; "
                      "install a CUDA build of torch to use the GPU")  # fmt: skip
    elif shutil.which("nvidia-smi"):
        yield Finding("note", "there is an NVIDIA driver, but torch finds no GPU; compare "
                      f"nvidia-smi with torch's CUDA {torch.version.cuda}")  # fmt: skip
    else:
        yield Finding("ok", "no CUDA GPU: all runs on the CPU, as the default commands expect")


def check_cache() -> Iterator[Finding]:
    """The folder for work that can be done again: place, size and whether it can be written."""
    from dynmoe.lab.cache import folder  # needs numpy

    place = folder()
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    text = f"cache {place}: {size / 1e9:.1f} GB"
    if fault := write_fault(place):
        yield Finding("note", f"{text}, cannot be written ({fault}): the same work is done in each "
                      "run; set XDG_CACHE_HOME to a folder of yours")  # fmt: skip
    else:
        yield Finding("ok", f"{text}, can be written; may be deleted at any time")


def check_runs(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written, and how much room there is for them."""
    if fault := write_fault(folder):
        yield Finding("problem", f"runs cannot be written to {folder} ({fault}); use --runs-dir "
                      "DIR with a folder of yours")  # fmt: skip
        return
    yield Finding("ok", f"runs can be written to {folder}")
    free = shutil.disk_usage(existing(folder)).free / 1e9
    text = f"{free:.1f} GB free on the disk of {folder}"
    if free < LITTLE_DISK:
        yield Finding("problem", f"{text}: too little for a run; make room")
    elif free < ENOUGH_DISK:
        yield Finding("note", f"{text}: enough for the default commands, little for photographs")
    else:
        yield Finding("ok", text)


def check_memory() -> Iterator[Finding]:
    """Memory that is free for a run, in GB: of the machine or, if less, of the container."""
    free = free_memory()
    if free is None:
        yield Finding("note", "the free memory cannot be read on this system; 2 GB are enough")
    elif free < LITTLE_MEMORY:
        yield Finding("note", f"{free:.1f} GB of memory are free: use --jobs 1, end other programs")
    else:
        yield Finding("ok", f"{free:.1f} GB of memory are free")


def free_memory() -> float | None:
    """In GB; None where the system does not tell."""
    found = []
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        found += [int(available[1]) * 1024] if available else []
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / name for name in ("memory.max", "memory.current"))
        found += [int(limit.read_text()) - int(used.read_text())]
    except (OSError, ValueError):  # no such file, or no limit ("max")
        pass
    return min(found) / 1e9 if found else None


def write_fault(folder: Path) -> str:
    """Why a file cannot be written to a folder, or where it would be made; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return reason(error)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.exists()), folder)


def reason(error: Exception) -> str:
    """The first line of an error, at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().split("\n")[0][:200]


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 8) of 2.8, of 2.8.0 and of 2.8.0+cpu."""
    parts = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in parts[0].split(".")] if parts else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


if __name__ == "__main__":
    run_command(main)

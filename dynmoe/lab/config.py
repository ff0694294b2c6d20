"""Typed settings: dataclasses that tyro reads from the command line and that runs save as JSON.

A command's settings are one frozen dataclass. A field made with `slot(kind, name)` holds the
`Config` of a registered part: `--router cosine` picks the part, `--router.temperature 0.5` sets its
options. A preset is a ready instance of the dataclass, chosen by `--preset`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import traceback
import typing
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from dynmoe import registry
from dynmoe.errors import ResourceError, UserError, unknown
from dynmoe.lab import torchrun
from dynmoe.lab.files import as_told
from dynmoe.lab.options import read_options
from dynmoe.ranges import check_settings
from dynmoe.registry import PartConfig

C = TypeVar("C")

RENAMED = {"cut": "pruning", "newborn": "new_experts", "strategy": "intervention"}
"""Settings as earlier versions called them -> their names now."""
RENAMED_PARTS = {("pruning", "redraw"): "reinit"}
"""(kind, name) of parts as earlier versions called them -> their names now."""


def place(default: Any) -> Any:
    """A field that says where or how a run is kept, and so is no part of its identity."""
    return dataclasses.field(default=default, metadata={"place": True})


KEEPING = ("name", "runs_dir", "resume", "checkpoint_every_s", "mirror")
RUNNING = ("jobs", "device", "threads", "allow_unused", "debug")
"""Settings that every command has, for the groups of its help: how a run is kept, how it runs."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every command has."""

    seed: int = 0
    """seed of all random numbers of the run"""
    seeds: int = place(1)
    """runs of each method, with seeds `seed`, `seed` + 1, ..."""
    jobs: int = place(1)
    """runs at a time, each a process; the results do not depend on it"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N"""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice"""
    runs_dir: Path = place(Path("runs"))
    """where run folders are made"""
    name: str | None = place(None)
    """the run's name; none: preset, what differs from it, and a hash"""
    resume: bool = place(False)
    """go on from the newest checkpoint of this run"""
    checkpoint_every_s: float = place(60.0)
    """seconds between checkpoints"""
    mirror: tuple[str, ...] = place(())
    """copy all of the log to wandb, mlflow or tensorboard as well"""
    allow_unused: bool = place(False)
    """accept options that have no effect with the others"""
    debug: bool = place(False)
    """show the traceback of an error"""


SMALLER = "use a smaller --batch-size or smaller layers; a run goes on from its checkpoint"
"""What helps where memory does not suffice."""


def slots(config: Any) -> dict[str, str]:
    """Field name -> kind, for each slot of a settings dataclass (class or instance)."""
    return {f.name: f.metadata["kind"] for f in dataclasses.fields(config) if "kind" in f.metadata}


def parse(presets: dict[str, C], argv: list[str], prog: str, description: str) -> tuple[str, C]:
    """Read a command line. The first preset is the default one.

    Returns the preset's name and the settings. tyro prints its own message and exits with 2 for a
    value of the wrong type; `--help` prints and exits with 0.

    Raises:
        UserError: unknown preset, option or part name, one that has been renamed, an option of a
            part that is not chosen, a value out of range, or an option that has no effect.
    """
    args = list(argv)
    preset = _pop(args, "preset") or next(iter(presets))
    if preset not in presets:
        raise unknown("preset", preset, presets)
    config = presets[preset]
    _refuse_renamed(config, args)
    for field, kind in slots(config).items():
        name = _pop(args, flag := field.replace("_", "-"))
        if name is not None and (kind, name) in RENAMED_PARTS:
            raise UserError(f"--{flag} {name} is now --{flag} {RENAMED_PARTS[kind, name]}")
        if name is not None and name != getattr(config, field).part.name:
            part_config = registry.get(kind, name).Config()
            config = dataclasses.replace(config, **{field: part_config})  # type: ignore[type-var]
    if not {"-h", "--help", "--help-all"}.isdisjoint(args):
        from dynmoe.lab.help import help_text

        full = "--help-all" in args
        print(help_text(config, list(presets), preset, prog, description, full))
        sys.exit(0)
    _refuse_others_options(config, args)
    parsed = read_options(type(config), args, prog, description, config)
    check_settings(parsed)
    check_name(parsed.name)  # type: ignore[attr-defined]
    if not parsed.allow_unused:  # type: ignore[attr-defined]
        refuse_unused(parsed, argv)
    return preset, parsed


def check_name(name: str | None) -> None:
    """Refuse a name of runs or results that leads out of the folder of runs.

    Raises:
        UserError: it does.
    """
    if name is None:
        return
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(
            f"--name {name!r} must name a folder below --runs-dir, such as first-try; to keep runs "
            "elsewhere use --runs-dir"
        )


def _refuse_others_options(config: Any, args: list[str]) -> None:
    """Refuse options of parts that are not chosen, such as --domains.data-dir of embedded domains.

    Raises:
        UserError: tells which parts have it; `read_options` tells of an option that no part has.
    """
    for field, kind in slots(config).items():
        own = getattr(config, field).part
        flag = f"--{field.replace('_', '-')}"
        for word in args:
            slot, _, option = word.split("=")[0].replace("_", "-").partition(".")
            option = option.partition(".")[0].removeprefix("no-").replace("-", "_")
            if slot != flag or not option or option in _options(own.Config):
                continue
            others = [n for n in registry.names(kind)
                      if option in _options(registry.get(kind, n).Config)]  # fmt: skip
            if others:
                raise UserError(
                    f"{word.split('=')[0]} is no option of {kind} {own.name}; it is one of "
                    f"the options of {', '.join(others)}: use {flag} {others[0]}, or leave it out"
                )


def _options(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def refuse_unused(config: Any, argv: list[str]) -> None:
    """Refuse options on the command line that change nothing with the other settings.

    A settings class may define `unused()`: option -> why it has no effect, and what to do. An
    option stands for those below it: "router" for `--router.temperature`, too.

    Raises:
        UserError: names the first such option.
    """
    reasons = config.unused() if hasattr(config, "unused") else {}
    for word in argv:
        if not word.startswith("--"):
            continue
        flag = word[2:].split("=")[0].replace("_", "-")
        path = [name.removeprefix("no-").replace("-", "_") for name in flag.split(".")]
        for depth in range(1, len(path) + 1):
            reason = reasons.get(".".join(path[:depth]))
            if reason is not None:
                raise UserError(
                    f"--{flag} has no effect: {reason} (or accept it with --allow-unused)"
                )


def run_command(main: Any, argv: list[str] | None = None) -> None:
    """Run `main(argv)` as a process: report a dynmoe error as one line and exit with its code."""
    from dynmoe.errors import DynmoeError

    argv = sys.argv[1:] if argv is None else argv
    try:
        main(argv)
    except DynmoeError as error:
        if "--debug" in argv:
            traceback.print_exc()
        if torchrun.first():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if torchrun.started() and _of_processes(error):
            if torchrun.first():
                print(f"error: {torchrun.LOST_ONE}", file=sys.stderr)
            sys.exit(ResourceError.exit_code)
        if not _of_memory(error):
            raise
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: out of memory: {_first_line(error)}; {SMALLER}", file=sys.stderr)
        sys.exit(ResourceError.exit_code)
    except BrokenPipeError:  # of `dynmoe cl --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        told = as_told(error)
        if told is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {told}", file=sys.stderr)
        sys.exit(told.exit_code)
    except KeyboardInterrupt:  # before a run began or after its end; a run has its own handling
        print("error: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def _of_processes(error: Exception) -> bool:
    """Whether another process of a run is gone or does not answer."""
    from dynmoe.lab.processes import lost

    return lost(error)


def _of_memory(error: Exception) -> bool:
    """Whether memory was asked for that is not there; torch has no class of its own for it."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain JSON values; a part becomes `{"part": its name, its options...}`."""
    out: dict[str, Any] = {}
    if isinstance(config, PartConfig):
        out["part"] = config.part.name
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        out[field.name] = value
    return out


def from_dict(kind: type[C], values: dict[str, Any]) -> C:
    """Settings from what `to_dict` made of them; fields that it lacks take their defaults.

    Raises:
        UserError: a part that is not registered, or a setting that has been renamed since.
    """
    for old in RENAMED.keys() & values:
        raise UserError(
            f"these settings were saved by an earlier version: {old} is now {RENAMED[old]}; make "
            "the run again"
        )
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        if "kind" in field.metadata:
            value = from_dict(registry.get(field.metadata["kind"], value["part"]).Config, value)
        elif dataclasses.is_dataclass(hint):
            value = from_dict(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, str) and Path in (hint, *typing.get_args(hint)):
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        given[field.name] = value
    return kind(**given)


def placed(config: Any) -> frozenset[str]:
    """Names of the settings made with `place`; of a settings dataclass or an instance."""
    return frozenset(f.name for f in dataclasses.fields(config) if f.metadata.get("place"))


def identity(config: Any) -> dict[str, Any]:
    """The settings that decide a run's numbers: all but those made with `place`."""
    apart = placed(config)
    return {k: v for k, v in to_dict(config).items() if k not in apart}


def digest(config: Any) -> str:
    """8 hex digits over the settings, the seed left out: one name for all seeds of a setting."""
    values = {k: v for k, v in identity(config).items() if k != "seed"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for each setting that differs between two `to_dict` results."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _refuse_renamed(config: Any, args: list[str]) -> None:
    """Say what an option is called now, where the settings have it by another name."""
    names = {f.name for f in dataclasses.fields(config)}
    flags = {
        f"--{old}": f"--{new.replace('_', '-')}" for old, new in RENAMED.items() if new in names
    }
    for arg in args:
        flag, mark, option = arg.split("=", 1)[0].partition(".")
        if flag in flags:
            raise UserError(f"{flag}{mark}{option} is now {flags[flag]}{mark}{option}")


def _pop(args: list[str], flag: str) -> str | None:
    """Take `--flag value` or `--flag=value` out of args; the last one given wins."""
    value, i = None, 0
    while i < len(args):
        if args[i] == f"--{flag}":
            if i + 1 == len(args):
                raise UserError(f"--{flag} needs a value")
            value = args[i + 1]
            del args[i : i + 2]
        elif args[i].startswith(f"--{flag}="):
            value = args.pop(i).split("=", 1)[1]
        else:
            i += 1
    return value

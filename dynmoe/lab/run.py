"""The run context: one folder, one lock, one seed, one log. Every command works inside one.

with Run("cl", preset, config) as run:
    if run.summary is None:                      # not finished earlier
        state = run.restored                     # None, or the checkpoint to go on from
        ...
        if run.checkpoint_due():                 # after each step: time, or a signal
            run.checkpoint(step, make_state())   # raises Interrupted after a signal
        run.finish({...})                        # writes summary.json
"""

from __future__ import annotations

import glob
import json
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

import torch

from dynmoe import __version__, registry, seeding
from dynmoe.errors import Interrupted, UserError
from dynmoe.lab import checkpoint, inputs, processes
from dynmoe.lab.config import RunConfig, difference, digest, identity, to_dict
from dynmoe.lab.device import make_deterministic, resolve
from dynmoe.lab.files import lock, remove_leftovers, write_json
from dynmoe.lab.log import Logger, SilentLogger
from dynmoe.lab.mirrors import Mirror, start_mirrors
from dynmoe.lab.results import figures, flat

PACKAGES = ("torch", "torchvision", "numpy", "avalanche-lib", "gymnasium", "craftax", "jax",
            "timm")  # fmt: skip


class Run:
    """A run's folder `runs_dir/command/name/seed-N` while it is being worked on.

    Args:
        command: "cl", "rl", ...
        preset: begins the default run name; see `dynmoe.lab.names`.
        config: the settings.
        label: put into the default run name, e.g. the method and the data set.
        read: files and data sets that it reads -> digests, see `Experiment.inputs`.

    Attributes:
        folder: the run's folder.
        device: the torch device.
        summary: the finished run's summary, or None while there is work to do.
        restored: state of the newest checkpoint with `--resume`, or None.
        log: the Logger (None when finished).

    Raises (on entering):
        UserError: the folder is in use, holds other settings or a run on other files, or holds an
            unfinished run and `--resume` was not given; the device is not there.
    """

    def __init__(
        self,
        command: str,
        preset: str,
        config: RunConfig,
        label: str = "",
        read: dict[str, str] | None = None,
    ) -> None:
        self.config, self.read = config, read or {}
        place = Path(config.runs_dir) / command
        self.name = config.name or _name(place, preset, label, digest(config))
        self.folder = place / self.name / f"seed-{config.seed}"
        self.checkpoints = self.folder / "checkpoints"
        self.device = resolve(config.device)
        self.summary: dict[str, Any] | None = None
        self.restored: dict[str, Any] | None = None
        self._log: Logger | None = None
        self._mirrors: list[Mirror] = []
        self._lock: IO[str] | None = None
        self._asked: int | None = None  # the signal that this process has got
        self._handlers: dict[int, Any] = {}
        self._saved_at = time.monotonic()

    @property
    def log(self) -> Logger:
        """The run's logger; only while there is work to do."""
        assert self._log is not None, "the run is finished"
        return self._log

    @property
    def _signal(self) -> int | None:
        """The signal that asks the run to stop; one that all its processes know of."""
        return processes.agreed_to_stop() if processes.joined() else self._asked

    def __enter__(self) -> Run:
        try:
            self._open(*processes.by_first(self._find))
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._log is not None:
                begun = kind is None or checkpoint.exists(self.checkpoints)
                self._log.close(failed=not begun)
        finally:
            for mirror in self._mirrors:
                mirror.close()
            self._release()
        if kind is None and self._signal is not None:  # it came after the last checkpoint
            name = signal.Signals(self._signal).name
            raise Interrupted(
                f"stopped by {name} after the end of {self.folder}; go on with: "
                f"{_command_line()} --resume",
                self._signal,
            )

    def checkpoint_due(self) -> bool:
        """Whether to save now: the interval has passed, or a signal asks the run to stop."""
        passed = time.monotonic() - self._saved_at
        return self._signal is not None or passed > self.config.checkpoint_every_s

    def checkpoint(self, step: int, state: dict[str, Any], logged: int | None = None) -> None:
        """Save `state` (plain values and tensors), the global generators and the log's position.

        Args:
            step: counts up; names the file.
            state: everything to go on from.
            logged: the latest step in the log, where the log counts otherwise than `step`.

        Raises:
            Interrupted: a signal came; the run can be resumed from here.
            ResourceError: disk full; the checkpoint before this one is intact.
        """
        if processes.rank() == 0:
            self._save(step, state, logged)
        self._saved_at = time.monotonic()
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(
                f"stopped by {name} at step {step}; go on with: {_command_line()} --resume",
                self._signal,
            )

    def _save(self, step: int, state: dict[str, Any], logged: int | None) -> None:
        saved = {
            "step": step,
            "logged": step if logged is None else logged,
            "log_position": self.log.sync(),
            "event_sizes": self.log.event_sizes(),
            "random": seeding.global_state(),
            "state": state,
        }
        checkpoint.save(self.checkpoints, step, saved)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which marks the run as finished. No times: it must be repeatable."""
        self.summary = summary
        if processes.rank() > 0:
            return
        self.log.sync()
        write_json(self.folder / "summary.json", summary)
        for mirror in self._mirrors:
            mirror.finished(figures(summary))

    def _find(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Lock the folder and say what is there: the summary, or a checkpoint, or neither.

        With several processes the first one's work, told to all.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {self.folder}: {error.strerror}; use another --runs-dir"
            ) from None
        self._lock = lock(self.folder)
        remove_leftovers(self.folder)
        check_settings(self.folder, self.config)
        summary = self.folder / "summary.json"
        if summary.is_file():
            inputs.check(self.folder, self.read)
            return json.loads(summary.read_text()), None
        saved = self._find_checkpoint()
        if saved is not None:
            inputs.check(self.folder, self.read)
        if self.read:
            write_json(self.folder / inputs.NAME, self.read)
        write_json(self.folder / "config.json", to_dict(self.config))
        self._write_environment(goes_on=saved is not None)
        if saved is None and "--resume" in sys.argv:
            print(f"nothing to resume in {self.folder}: the run begins", file=sys.stderr)
        return None, saved

    def _open(self, summary: dict[str, Any] | None, saved: dict[str, Any] | None) -> None:
        """Be ready to work, unless the run is finished."""
        self.summary = summary
        if summary is not None:
            return
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        make_deterministic(self.device)
        seeding.seed_global(self.config.seed)
        self._log = self._logger(saved)
        if saved is not None:
            self._random, self.restored = saved["random"], saved["state"]
            self.restore_generators()
        if processes.rank() == 0:
            self._mirrors = start_mirrors(
                self.config.mirror, self.folder, f"{self.name}/seed-{self.config.seed}",
                flat(identity(self.config), lists=True),
            )  # fmt: skip
        processes.forget_signals()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def restore_generators(self) -> None:
        """Global generators as the checkpoint has them."""
        seeding.load_global_state(self._random)

    def _logger(self, saved: dict[str, Any] | None) -> Logger:
        """The log, cut back to what a checkpoint knows of; rank 0's alone writes."""
        if processes.rank() > 0:
            return SilentLogger(self.folder)
        if saved is None:
            return Logger(self.folder)
        logged = saved.get("logged", saved["step"])  # older runs do not know it
        return Logger(self.folder, saved["log_position"], logged, saved.get("event_sizes"))

    def _find_checkpoint(self) -> dict[str, Any] | None:
        if not checkpoint.exists(self.checkpoints):
            return None
        if not self.config.resume:
            raise UserError(
                f"{self.folder} holds an unfinished run; go on with --resume, or start another "
                "with --name"
            )
        return checkpoint.load_latest(self.checkpoints)

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """First signal: stop at the next step. Second: stop at once.

        Of several processes each may get the terminal's signal, and one of torchrun after it.
        """
        if self._asked is not None and not processes.joined():
            raise Interrupted("stopped at once; resume from the last checkpoint", number)
        self._asked = number
        processes.ask_to_stop(number)

    def _write_environment(self, goes_on: bool) -> None:
        """Add this session's packages, device and command to environment.json."""
        path = self.folder / "environment.json"
        sessions = json.loads(path.read_text())["sessions"] if path.is_file() else []
        now = {
            "command": _command_line(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "dynmoe": __version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "device": _device_name(self.device),
            "threads": self.config.threads or torch.get_num_threads(),
            "packages": {name: _version(name) for name in PACKAGES},
            "own_parts": registry.describe_own_parts(),
        }
        if goes_on and sessions:
            _warn_of_other_versions(self.folder, sessions[-1], now)
        write_json(path, {"sessions": [*sessions, now]})


def check_settings(folder: Path, config: RunConfig) -> None:
    """Refuse a run's folder that holds a run with other settings, and say which differ.

    What was left by an attempt that never got to a checkpoint is no run. A setting that the run was
    made without, because it came later, has its default: what was done before.

    Args:
        folder: the run's.
        config: the settings that are asked for.

    Raises:
        UserError: they differ, or cannot be read.
    """
    path, summary = folder / "config.json", folder / "summary.json"
    begun = summary.is_file() or checkpoint.exists(folder / "checkpoints")
    if not begun or not path.is_file():
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        raise UserError(
            f"{path} cannot be read; delete {folder} to run it again, or use another --name"
        ) from None
    settings = identity(config)
    known = identity(type(config)()) | {k: v for k, v in saved.items() if k in settings}
    changed = difference(known, settings)
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}); "
            "use those settings, or another --name"
        )


def _name(place: Path, preset: str, label: str, settings: str) -> str:
    """A run's name, which ends in the hash of its settings.

    A folder of these settings and this preset that is there already is taken, whatever else its
    name says: earlier versions did not tell what differs from the preset.
    """
    own = "-".join(filter(None, [preset, label, settings]))
    begins = glob.escape(preset.split("-")[0])
    there = sorted(path.name for path in place.glob(f"{begins}-*-{settings}"))
    return there[0] if there and own not in there else own


def remove_if_never_begun(folder: Path) -> None:
    """Delete a run's folder in which nothing has been logged or saved, unless it is in use."""
    log = folder / "log.jsonl"
    begun = (folder / "summary.json").is_file() or checkpoint.exists(folder / "checkpoints")
    if not folder.is_dir() or begun or (log.is_file() and log.stat().st_size):
        return
    try:
        held = lock(folder)
    except UserError:
        return
    with held:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it holds other runs
        folder.parent.rmdir()


def _command_line() -> str:
    """This process's command, as one would type it."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    return shlex.join([*program.split(), *(a for a in sys.argv[1:] if a != "--resume")])


def _commit() -> str | None:
    """Commit of the source tree, with "+changes" when it is not clean; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _warn_of_other_versions(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """One line on stderr where a run goes on under other versions than in its session before."""
    old, new = ({"python": s.get("python"), **s.get("packages", {})} for s in (before, now))
    changed = difference(old, {name: new.get(name) for name in old})
    if changed:
        print(
            f"warning: {folder} goes on under other versions ({'; '.join(changed)}); its numbers "
            "may differ from those of a run that was not stopped (environment.json has both)",
            file=sys.stderr,
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

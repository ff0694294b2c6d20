"""Each safeguard of runs and checkpoints is taken out of a copy, and a test must then fail.

pytest -n 0 -m slow tests/faults/test_mutations.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("dynmoe", "agents", "envs", "cl_benchmarks", "tests", "pyproject.toml")
"""What the copy holds."""


@dataclass(frozen=True)
class Mutation:
    """A safeguard, how it is taken out, and the tests that guard it."""

    file: str
    before: str
    after: str
    tests: str


CHECKPOINT, FILES, LOG, RUN = (f"dynmoe/lab/{n}.py" for n in ("checkpoint", "files", "log", "run"))
OF_CHECKPOINTS, OF_FILES, OF_LOGS, OF_RUNS = (
    f"tests/unit/test_{name}.py" for name in ("checkpoint", "files", "log", "run")
)
MUTATIONS = {
    "a file is replaced at once": Mutation(
        FILES, "os.replace(temporary, path)", "path.write_bytes(data)", OF_FILES
    ),
    "a failed write leaves no temporary file": Mutation(
        FILES, "        temporary.unlink(missing_ok=True)\n", "", OF_FILES
    ),
    "a full disk is told as such": Mutation(
        FILES, "raise disk_full(path, len(data)) from error", "raise", OF_FILES
    ),
    "what a killed process left is removed": Mutation(
        FILES, "        path.unlink(missing_ok=True)\n", "        pass\n", OF_FILES
    ),
    "nan is null in JSON": Mutation(
        FILES, "and not math.isfinite(value)", "and False", OF_FILES
    ),
    "a folder is locked": Mutation(
        FILES, "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", OF_RUNS
    ),
    "checksums are compared": Mutation(
        CHECKPOINT, "if _checksum(data) in _known_checksums(path):", "if data:", OF_CHECKPOINTS
    ),
    "the checkpoint before a damaged one is used": Mutation(
        CHECKPOINT, "in reversed(paths)", "in paths[-1:]", OF_CHECKPOINTS
    ),
    "two checkpoints are kept": Mutation(CHECKPOINT, "KEEP = 2", "KEEP = 1", OF_CHECKPOINTS),
    "no more than two are kept": Mutation(CHECKPOINT, "KEEP = 2", "KEEP = 9", OF_CHECKPOINTS),
    "a replaced checkpoint is known by either checksum": Mutation(
        CHECKPOINT, "[*replaced, checksum]", "[checksum]", OF_CHECKPOINTS
    ),
    "a full disk costs the oldest checkpoint, not the run": Mutation(
        CHECKPOINT, "if len(older) < 2:", "if older:", OF_CHECKPOINTS
    ),
    "later, damaged checkpoints go first": Mutation(
        CHECKPOINT, "if later.name > path.name:", "if False:", OF_CHECKPOINTS
    ),
    "checkpoints never run code": Mutation(
        CHECKPOINT, 'map_location="cpu", weights_only=True', "weights_only=False", OF_CHECKPOINTS
    ),
    "a resumed log loses what came after the checkpoint": Mutation(
        LOG, "        self._file.truncate(position)\n", "", OF_LOGS
    ),
    "so do TensorBoard's files": Mutation(
        LOG, "            os.truncate(path, size)\n", "            pass\n", OF_LOGS
    ),
    "TensorBoard's files of later attempts are deleted": Mutation(
        LOG, "            path.unlink()\n", "            pass\n", OF_LOGS
    ),
    "after a clock was set back TensorBoard's files keep their order": Mutation(
        LOG, "        _put_before_now(folder)\n", "", OF_LOGS
    ),
    "other versions than before are told": Mutation(
        RUN, "if goes_on and sessions:", "if False:", OF_RUNS
    ),
    "a run's settings may not change": Mutation(
        RUN, "        check_settings(self.folder, self.config)\n", "", OF_RUNS
    ),
    "a finished run is read": Mutation(RUN, "if summary.is_file():", "if False:", OF_RUNS),
    "an unfinished one is not begun again without --resume": Mutation(
        RUN, "if not self.config.resume:", "if False:", OF_RUNS
    ),
    "random numbers go on where they were": Mutation(
        RUN, "        seeding.load_global_state(self._random)\n", "        pass\n", OF_RUNS
    ),
    "a signal saves and stops": Mutation(
        RUN, "return self._signal is not None or passed", "return passed", OF_RUNS
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their tests, to be spoilt."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, tests], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_the_copy_passes(copied: Path) -> None:
    """Else the failures below would say nothing."""
    for tests in (OF_CHECKPOINTS, OF_FILES, OF_LOGS, OF_RUNS):
        done = run_tests(copied, tests)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_without_it_a_test_fails(name: str, copied: Path) -> None:
    mutation = MUTATIONS[name]
    path = copied / mutation.file
    whole = path.read_text()
    assert whole.count(mutation.before) == 1, f"{mutation.before!r} is not once in {path.name}"
    path.write_text(whole.replace(mutation.before, mutation.after))
    try:
        done = run_tests(copied, mutation.tests)
    finally:
        path.write_text(whole)
    assert done.returncode == 1, f"no test of {mutation.tests} noticed:\n{done.stdout[-1500:]}"


def test_every_safeguard_is_still_there() -> None:
    """So that a renamed one does not drop out of the list unseen."""
    for name, mutation in MUTATIONS.items():
        assert (ROOT / mutation.file).read_text().count(mutation.before) == 1, name

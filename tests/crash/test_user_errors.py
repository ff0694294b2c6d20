"""What a user can get wrong ends in one line that says how to mend it, and in the right exit code.

2: the user's input, 3: numbers that are no longer finite, 4: out of disk.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_helpers import error_line, exit_code
from PIL import Image

from dynmoe import cl, registry
from dynmoe.lab import checkpoint, files
from dynmoe.lab.config import run_command
from dynmoe.lab.run import Run

ROOT = Path(__file__).parents[2]
SMALL = (
    "--preset smoke --compare --epochs 1 --eval-samples 60 --probe-samples 40 "
    "--network.width 24 --network.hidden 48 --checkpoint-every-s 0"
)
"""On digits, shuffle stream of 300 images: 3 tasks of 5 batches each."""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache or working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "work")


def _run(flags: str, *more: str) -> int:
    """Run the command in this process; its exit code."""
    return exit_code(cl.main, [*SMALL.split(), *flags.split(), *more])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset smok", "unknown preset 'smok'; known: laptop, minute, smoke, plain, paper, "
         "tiny, tiny-long, keep, online, pairs. Did you mean 'smoke'?"),
        ("--method dynamcmoe", "unknown method 'dynamcmoe'; known: "
         + ", ".join(registry.names("method")) + ". Did you mean 'dynamicmoe'?"),
        ("--protocol shufle", "Did you mean 'shuffle'?"),
        ("--intervention red", "Did you mean 'redo'?"),
        ("--router cosin", "Did you mean 'cosine'?"),
        ("--dataset digit", "Did you mean 'digits'?"),
        ("--compare fresk", "unknown method 'fresk'"),
        ("--method", "--method needs a value"),
        ("--granularity 0", "granularity 0 must be at least 1"),
        ("--granularity -3", "--granularity -3 is too small; use 0 or more"),
        ("--granularity 30 --network.hidden 80", "granularity 30 grows to 90 experts, but the "
         "constant budget holds 80 hidden units"),
        ("--network.blocks 0", "blocks=0"),
        ("--router topk --router.k 0", "topk router: k=0"),
        ("--trigger every --trigger.steps 0", "trigger every: steps=0"),
        ("--method wide --method.factor 0", "factor=0 must be at least 1"),
        ("--protocol class --chunks 3", "3 chunks do not divide 10 classes; use --chunks 1, 2, 5"),
        ("--protocol iid --chunks 11", "11 chunks do not divide 1400 training images; use --chunks "
         "8, 10, 14, 20"),
        ("--access cumulative", "use --access limited"),
        ("--protocol.images 5000", "use --protocol.images 1400 or fewer"),
        ("--epochs 0", "--epochs 0 is too small; use 1 or more"),
        ("--batch-size 0", "--batch-size 0 is too small; use 1 or more"),
        ("--probe-samples 0", "--probe-samples 0 is too small"),
        ("--lr nan", "--lr nan is no finite number; use 0 or more"),
        ("--threads -1", "--threads -1 is too small"),
        ("--seed -1", "--seed -1 is too small"),
        ("--device cuda:99", "use --device cpu or --device auto"),
        ("--device tpu", "unknown device 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        ("--compare dynamicmoe", "--compare dynamicmoe: that is the main run itself"),
    ],
)  # fmt: skip
def test_bad_settings(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(f"--name x --runs-dir {tmp_path}", *flags.split()) == 2
    out, err = capsys.readouterr()
    assert message in error_line(err)
    assert out == ""


def test_settings_that_failed_do_not_occupy_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(f"--name x --runs-dir {tmp_path} --granularity 0") == 2
    assert _run(f"--name x --runs-dir {tmp_path} --granularity 1") == 0
    assert "experts" in capsys.readouterr().out


def test_method_among_the_default_comparisons(tmp_path: Path) -> None:
    """`--method dense` alone must not ask for another `--compare`."""
    argv = f"{SMALL} --method dense --name x --runs-dir {tmp_path}".replace("--compare", "")
    run_command(cl.main, argv.split())
    assert sorted(p.name for p in (tmp_path / "cl").iterdir()) == ["x", "x-fresh"]


@pytest.mark.parametrize("flag", ["--granularty", "--router.temprature"])
def test_unknown_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro's own message: it names the flag and one that is near."""
    assert _run(flag, "3") == 2
    err = capsys.readouterr().err
    assert flag in err and "Traceback" not in err
    assert {"--granularty": "--granularity", "--router.temprature": "--router.temperature"}[
        flag
    ] in err


def test_missing_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = torch.cuda.device_count()
    device = f"cuda:{count}" if count else "cuda"  # the first that is not there
    assert _run(f"--runs-dir {tmp_path} --device {device}") == 2
    assert f"torch sees {count} CUDA devices" in error_line(capsys.readouterr().err)


def test_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert _run(f"--runs-dir {tmp_path / 'file'}") == 2
    assert "use another --runs-dir" in error_line(capsys.readouterr().err)


def _tiny_imagenet(root: Path) -> Path:
    """200 classes with one training and one validation image each."""
    image = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(image, "JPEG")
    for split in ("train", "val"):
        for number in range(200):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / "0.JPEG").write_bytes(image.getvalue())
    return root


def test_folders_and_files_of_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = _tiny_imagenet(tmp_path / "data" / "tiny-imagenet-200")
    flags = f"--runs-dir {tmp_path} --dataset tiny-imagenet --dataset.data-dir"

    assert _run(f"{flags} {tmp_path / 'nowhere'}") == 2
    assert f"not found in {tmp_path / 'nowhere'}" in error_line(capsys.readouterr().err)

    assert _run(f"{flags} {tree / 'train'}") == 2
    message = error_line(capsys.readouterr().err)
    assert "expected 200 class folders" in message and f"Did you mean {tree}?" in message

    broken = tree / "train" / "n00000123" / "0.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    assert _run(f"{flags} {tree}") == 2
    assert f"cannot read image {broken}: " in error_line(capsys.readouterr().err)


def test_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(cl.presets()["smoke"], name="x", runs_dir=tmp_path)
    with Run("cl", "smoke", config):
        assert _run(f"--name x --runs-dir {tmp_path}") == 2
    assert f"is in use by process {os.getpid()}" in error_line(capsys.readouterr().err)


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        _run(f"--name x --runs-dir {tmp_path} --optimizer sgd --lr 1e30 --weight-decay 1e30") == 3
    )
    assert "is no longer finite at step 1" in error_line(capsys.readouterr().err)
    assert not checkpoint.exists(tmp_path / "cl" / "x" / "seed-0" / "checkpoints")


def test_not_finite_loss_then_another_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint before it is kept, and belongs to those settings only."""
    flags = f"--name x --runs-dir {tmp_path}"
    assert _run(f"{flags} --optimizer sgd --lr 1e30") == 3
    message = error_line(capsys.readouterr().err)
    assert "the loss is nan in task 1, epoch 1, batch 2" in message and "--lr" in message
    folder = tmp_path / "cl" / "x" / "seed-0"
    assert checkpoint.load_latest(folder / "checkpoints")["step"] == 1  # type: ignore[index]
    assert not (folder / "summary.json").exists()

    assert _run(f"{flags} --optimizer sgd --lr 1e30") == 2
    assert "holds an unfinished run; go on with --resume" in error_line(capsys.readouterr().err)

    assert _run(f"{flags} --resume --optimizer sgd --router topk --network.width 25") == 2
    message = error_line(capsys.readouterr().err)
    for line in ("lr: 1e+30 -> 0.001", "network.width: 24 -> 25", "router.part: cosine -> topk"):
        assert line in message
    assert "resume: " not in message  # says how a run is kept, not what it is


class _Full(io.FileIO):
    """A file on a disk that is full after half of what is written."""

    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run stops with exit code 4, everything written before is whole, and it can go on."""
    flags = f"--name x --runs-dir {tmp_path}"
    folder = tmp_path / "cl" / "x" / "seed-0"

    def open_on_full_disk(path: Path, mode: str) -> Any:
        return _Full(path, mode) if "step-000000005.pt." in path.name else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", open_on_full_disk, raising=False)
        assert _run(flags) == 4
    message = error_line(capsys.readouterr().err)
    assert "disk full: writing step-000000005.pt" in message and "MB are free" in message
    assert not list(folder.rglob("*.tmp"))
    assert checkpoint.load_latest(folder / "checkpoints")["step"] == 4  # type: ignore[index]

    assert _run(f"{flags} --resume") == 0
    assert _run(f"--name whole --runs-dir {tmp_path}") == 0
    whole = tmp_path / "cl" / "whole" / "seed-0"
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_folder_deleted_while_it_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = checkpoint.save

    def save_and_delete(folder: Path, step: int, state: dict[str, Any]) -> Path:
        path = save(folder, step, state)
        shutil.rmtree(folder.parent)
        return path

    monkeypatch.setattr(checkpoint, "save", save_and_delete)
    assert _run(f"--name x --runs-dir {tmp_path}") == 2
    message = error_line(capsys.readouterr().err)
    assert str(tmp_path / "cl" / "x" / "seed-0") in message and "No such file" in message
    assert "leave files and folders in their place" in message


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--router cosin --debug") == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "dynmoe/registry.py" in err
    assert "\nerror: unknown router 'cosin'" in err


def test_real_processes(tmp_path: Path) -> None:
    """Exit code and stderr as a shell sees them: one line."""

    def start(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dynmoe.cl", *SMALL.split(), "--runs-dir", str(tmp_path)]
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)

    unknown = start("--router", "cosin")
    assert unknown.returncode == 2 and unknown.stdout == ""
    assert unknown.stderr.count("\n") == 1 and "Did you mean 'cosine'?" in error_line(
        unknown.stderr
    )

"""Runs whose images or weights have changed since: they are told apart though settings agree."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import dynmoe.cl
import dynmoe.experiments.dg.experiment as dg
import dynmoe.experiments.tta.experiment as tta
from cl_benchmarks.domain_set import Domain, DomainSet
from cl_benchmarks.shifts.folders import Fit, FolderShifts, class_folder
from dynmoe.errors import UserError
from dynmoe.experiments.dg.settings import Config as DgConfig
from dynmoe.experiments.tta.settings import Config as TtaConfig
from dynmoe.lab import inputs
from dynmoe.lab.config import RunConfig
from dynmoe.lab.run import Run


def _images(root: Path, count: int = 5) -> list[Path]:
    """Two folders of noise."""
    files = []
    for name in "ab":
        for number in range(count):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _noise(path, seed=number)
            files.append(path)
    return files


def _noise(path: Path, seed: int, size: int = 32) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def test_a_digest_is_of_names_and_sizes(tmp_path: Path) -> None:
    files = _images(tmp_path / "one" / "set")
    (first,) = inputs.images("set", None, files).values()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = [tmp_path / "two" / path.relative_to(tmp_path / "one") for path in files]
    assert inputs.images("set", tmp_path, moved) == {f"images of set in {tmp_path}": first}
    others = [files[1:], [*files[1:], files[0]]]
    _noise(moved[3], seed=9, size=40)
    others.append(moved)
    found = {first, *(v for each in others for v in inputs.images("set", None, each).values())}
    assert len(found) == 4
    assert inputs.images("set", None, []) == {}


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    assert inputs.weights(None) == inputs.weights(path) == {}
    path.write_bytes(b"one")
    before = inputs.weights(path)
    path.write_bytes(b"two")  # of the same size
    assert before.keys() == inputs.weights(path).keys() == {f"weights {path}"}
    assert before != inputs.weights(path)


def _run(folder: Path, read: dict[str, str], **changes: Any) -> Run:
    config = replace(RunConfig(runs_dir=folder, device="cpu"), **changes)
    return Run("test", "preset", config, "label", read)


def test_a_run_on_other_files_is_neither_read_nor_continued(tmp_path: Path) -> None:
    one, other = {"weights w.pt": "1"}, {"weights w.pt": "2"}
    with _run(tmp_path, one) as run:
        run.checkpoint(1, {})
    with _run(tmp_path, one, resume=True) as run:
        assert run.restored == {}
    with pytest.raises(UserError, match=r"a run on other weights w\.pt than there are now; use"):
        _run(tmp_path, other, resume=True).__enter__()
    with _run(tmp_path, one, resume=True) as run:
        run.finish({"accuracy": 1.0})
    with _run(tmp_path, one) as run, _run(tmp_path, {}, seed=1) as without:
        assert run.summary == {"accuracy": 1.0} and without.summary is None
    assert not (without.folder / "inputs.json").exists()
    with pytest.raises(UserError, match=r"a run on other weights w\.pt than there are now"):
        _run(tmp_path, other).__enter__()
    (run.folder / "inputs.json").unlink()  # as runs of older versions
    with _run(tmp_path, other) as run:
        assert run.summary == {"accuracy": 1.0}


def test_runs_before_and_after_a_change_are_not_compared(tmp_path: Path) -> None:
    folders = []
    for seed, digest in enumerate("112"):
        with _run(tmp_path, {"weights w.pt": digest, "images of x": "3"}, seed=seed) as run:
            run.finish({})
        folders.append(run.folder)
    inputs.check_alike(folders[:2])
    with pytest.raises(UserError, match="seed-0 and .*seed-2 were run on weights w.pt that had"):
        inputs.check_alike(folders)


def test_a_changed_image_is_told_at_the_next_run(tmp_path: Path) -> None:
    """From the command line, with the images of a folder of one's own."""
    files = _images(tmp_path / "data")
    flags = (
        f"--preset smoke --dataset folder --dataset.data-dir {tmp_path / 'data'} --dataset.size 32 "
        f"--protocol shuffle --protocol.images 8 --chunks 2 --epochs 1 --method dense "
        f"--name x --seeds 1 --jobs 1 --runs-dir {tmp_path / 'runs'} --allow-unused --compare"
    ).split()
    dynmoe.cl.main(flags)
    dynmoe.cl.main(flags)  # finished: read
    _noise(files[0], seed=7, size=40)
    with pytest.raises(UserError, match="a run on other images of data-32 in .* than there are"):
        dynmoe.cl.main(flags)


def test_a_corrected_table_is_told_at_the_next_run(tmp_path: Path) -> None:
    """Of rows in time order, though its size is the same."""
    rows = [f"{number % 7}.0,{number % 3}.5,{'ab'[number % 2]}" for number in range(40)]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(rows))
    flags = (
        f"--preset online --dataset.file {file} --method dense --device cpu --probe-samples 8 "
        f"--chunks 2 --name x --seeds 1 --jobs 1 --runs-dir {tmp_path / 'runs'} --allow-unused "
        "--compare"
    ).split()
    dynmoe.cl.main(flags)
    dynmoe.cl.main(flags)  # finished: read
    file.write_text("\n".join(["9" + rows[0][1:], *rows[1:]]))
    with pytest.raises(UserError, match=r"a run on other rows of .*rows\.csv than there are now"):
        dynmoe.cl.main(flags)


def test_what_adaptation_and_generalisation_read(tmp_path: Path) -> None:
    files, weights = _images(tmp_path / "data"), tmp_path / "w.pt"
    weights.write_bytes(b"w")
    images = class_folder(tmp_path / "data")
    source = FolderShifts(images, Fit(32), torch.arange(2), 2)
    adapting = TtaConfig(data="folder", data_dir=tmp_path / "data", weights=weights)
    found = tta.TestTimeAdaptation().inputs(adapting, SimpleNamespace(source=source))  # type: ignore[arg-type]
    of_weights = inputs.weights(weights)
    assert found == of_weights | inputs.images("data", tmp_path / "data", files)

    labels = torch.zeros(5, dtype=torch.int64)
    domains = tuple(Domain(n, tuple(files[i : i + 5]), labels) for n, i in (("a", 0), ("b", 5)))
    data = SimpleNamespace(data=DomainSet("set", domains, ("c",)))
    found = dg.DomainGeneralisation().inputs(DgConfig(weights=weights), data)  # type: ignore[arg-type]
    assert found == of_weights | inputs.images("set", None, files)

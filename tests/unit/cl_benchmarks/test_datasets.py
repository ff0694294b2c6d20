"""Every data set that can be chosen by name, and those that need no big download."""

from __future__ import annotations

import ast
import hashlib
import inspect
import pickle
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cl_benchmarks.images import ImageData
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.lab import cache

PARTS = [(kind, n) for kind in ("dataset", "protocol") for n in registry.names(kind)]
SMALL = {"classes": 4, "size": 16, "train_per_class": 6, "test_per_class": 3}


def _load(name: str, seed: int = 0, **options: Any) -> ImageData:
    return registry.get("dataset", name).Config(**options).build().load(seed)


def _same(a: ImageData, b: ImageData) -> bool:
    return all(
        torch.equal(getattr(a, f), getattr(b, f))
        for f in ("train_images", "train_labels", "test_images", "test_labels")
    )


def test_all_data_sets_are_there() -> None:
    names = {n for kind, n in PARTS if kind == "dataset"}
    assert {"fractal", "digits", "cifar100", "tiny-imagenet", "auto"} <= names


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_builds_by_default_and_is_documented(kind: str, name: str) -> None:
    part = registry.get(kind, name)
    assert type(part.Config().build()) is part and part.Config.part is part
    assert 20 < len(registry.summary(kind, name)) <= 100 and part.Config.__doc__
    assert all(f.kw_only for f in fields(part.Config))
    body = ast.parse(textwrap.dedent(inspect.getsource(part.Config)))
    definition = next(n for n in ast.walk(body) if isinstance(n, ast.ClassDef))
    for field, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), f"{ast.unparse(field)} has no docstring"


def test_parts_import_no_heavy_package() -> None:
    import subprocess

    code = (
        "import sys; from dynmoe import registry; registry.names('dataset'); "
        "registry.names('protocol'); import cl_benchmarks.stream; "
        "print([m for m in ('torchvision', 'sklearn', 'PIL', 'avalanche', 'dynmoe.moe', "
        "'dynmoe.growth', 'dynmoe.nets') if m in sys.modules])"
    )
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert ran.stdout.strip() == "[]"


def test_fractal_has_the_promised_images_and_follows_the_seed() -> None:
    data = _load("fractal", **SMALL)
    assert data.name == "fractal-hard-16" and data.num_classes == 4 and data.shape == (1, 16, 16)
    assert data.train_labels.bincount().tolist() == [6] * 4
    assert data.test_labels.bincount().tolist() == [3] * 4
    assert _same(data, _load("fractal", **SMALL))
    for path in cache.folder().iterdir():
        path.unlink()
    assert _same(data, _load("fractal", **SMALL))
    assert not torch.equal(data.train_images, _load("fractal", seed=1, **SMALL).train_images)
    easy = _load("fractal", views="easy", **SMALL)
    assert easy.name == "fractal-easy-16" and not torch.equal(easy.train_images, data.train_images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 201}, "class 200 does not exist"),
        ({"classes": 1}, "classes 1 is too small; use 2 to 200"),
        ({"train_per_class": 0}, "train_per_class 0 is too small"),
        ({"size": 7}, "size 7 is out of range"),
        ({"views": "odd"}, "'odd'; use one of"),
    ],
)
@pytest.mark.parametrize("name", ["fractal", "auto"])
def test_fractal_options_are_checked_when_built(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        registry.get("dataset", name).Config(**options).build()


def test_digits_are_balanced_disjoint_and_fixed() -> None:
    from sklearn.datasets import load_digits

    data = _load("digits")
    assert data.shape == (1, 8, 8) and data.name == "digits"
    assert data.train_labels.bincount().tolist() == [140] * 10
    assert data.test_labels.bincount().tolist() == [34] * 10
    assert _same(data, _load("digits", seed=5))
    raw = load_digits()
    known = {
        (x.tobytes(), int(y)) for x, y in zip(raw.images.astype(np.uint8), raw.target, strict=True)
    }
    images = torch.cat([data.train_images, data.test_images])[:, 0]
    back = np.rint(images.numpy() / 255 * 16).astype(np.uint8)
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    got = [(x.tobytes(), y) for x, y in zip(back, labels, strict=True)]
    assert set(got) <= known and len(set(got)) == len(got)  # no image twice, none in both splits


def test_auto_falls_back_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = _load("auto", **SMALL)
    err = capsys.readouterr().err
    assert _same(data, _load("fractal", **SMALL)) and data.name == "fractal-hard-16"
    assert err.count("\n") == 1 and err.startswith("dataset: Tiny ImageNet not found in [data/tiny")
    assert str(tmp_path / "home" / ".avalanche" / "data") in err
    with pytest.raises(UserError, match=f"no Tiny ImageNet in .*{tmp_path / 'mine'}"):
        _load("auto", data_dir=tmp_path / "mine", **SMALL)


def _write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Tiny files in CIFAR-100's format, which torchvision accepts once it knows their MD5."""
    from torchvision.datasets import CIFAR100

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(3, 3, 32, 32), dtype=np.uint8)
    contents: dict[str, Any] = {
        "train": {"data": pixels.reshape(3, -1), "fine_labels": [5, 99, 0]},
        "test": {"data": pixels[:1].reshape(1, -1), "fine_labels": [7]},
        "meta": {"fine_label_names": [str(i) for i in range(100)]},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(
        CIFAR100, "meta", {**CIFAR100.meta, "filename": "meta", "md5": sums["meta"]}
    )
    return pixels


@pytest.mark.parametrize("given", ["", "cifar-100-python"])
def test_cifar_is_read_from_the_tree_or_its_parent(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = _write_cifar(tmp_path / "d", monkeypatch)
    data = _load("cifar100", data_dir=tmp_path / "d" / given)
    assert data.num_classes == 100 and data.name == "cifar100"
    assert data.train_images.numpy().tobytes() == pixels.tobytes()
    assert data.train_labels.tolist() == [5, 99, 0] and data.test_labels.tolist() == [7]


def test_cifar_missing_or_broken_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"in data, .*home/.avalanche/data/cifar100; .*data-dir DIR"
    ):
        _load("cifar100")
    with pytest.raises(UserError, match=f"cifar-100-python in {tmp_path}; "):
        _load("cifar100", data_dir=tmp_path)
    _write_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be used: .*--dataset.download") as caught:
        _load("cifar100", data_dir=tmp_path)
    assert "\n" not in str(caught.value)

"""Training the transformer over a frozen stem: what a step learns, and going on after a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_benchmarks import stem_training
from cl_benchmarks.shifts.folders import TINY_FIT, ClassImages
from cl_benchmarks.stem_training import (
    StemVitTraining,
    load_stem,
    schedule,
    trained_stem_vit,
    write_features,
)
from cl_benchmarks.stem_vit import STEM, StemViT
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.lab import cache

SMALL = StemVitTraining(
    width=8, depth=1, heads=2, mlp_ratio=1.0, epochs=2, batch_size=4, threads=1, lr=0.01
)


@pytest.fixture
def images(tmp_path: Path) -> ClassImages:
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return ClassImages("six", ("a", "b"), tuple(files), (0, 0, 0, 1, 1, 1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's whole network, with weights and statistics of its own."""
    torch.manual_seed(5)
    net = timm.create_model(STEM)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
    file = tmp_path_factory.mktemp("weights") / "stem.pt"
    torch.save(net.state_dict(), file)
    return file


def test_the_stem_of_timms_file_and_of_a_stem_vits(weights: Path, tmp_path: Path) -> None:
    one, two = StemViT(2, 8, 1, 2), StemViT(3, 8, 1, 2)
    load_stem(one, weights)
    values = torch.load(weights, weights_only=True)
    assert torch.equal(one.stem[0].weight, values["conv_stem.weight"])
    assert torch.equal(one.stem[1].running_mean, values["bn1.running_mean"])
    own = dict(one.stem[2].named_buffers())
    assert all(torch.equal(v, values[f"blocks.0.{k}"]) for k, v in own.items())
    save_file(one.state_dict(), tmp_path / "vit.safetensors")
    load_stem(two, tmp_path / "vit.safetensors")
    same = two.stem.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.stem.state_dict().items())
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="are those of another model") as caught:
        load_stem(two, tmp_path / "other.pt")
    assert "\n" not in str(caught.value)


def test_features_are_the_stems_of_image_and_mirror_image(
    images: ClassImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stem_training, "PART", 4)
    model = StemViT(2, 8, 1, 2)
    parts = write_features(model, images, TINY_FIT, tmp_path / "f")
    assert [part.shape for part in parts] == [(4, 2, 64, 112), (2, 2, 64, 112)]
    x = torch.from_numpy(np.array(Image.open(images.files[5]))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        pair = torch.cat([model.features(x), model.features(x.flip(3))])
    torch.testing.assert_close(torch.tensor(parts[1][1]), pair.half(), rtol=0.01, atol=0.01)
    (tmp_path / "f" / "part-00001.npy").unlink()
    before = (tmp_path / "f" / "part-00000.npy").stat().st_mtime_ns
    write_features(model, images, TINY_FIT, tmp_path / "f")
    assert (tmp_path / "f" / "part-00000.npy").stat().st_mtime_ns == before


def test_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2))) and rates[99] < 0.001


def test_the_loss_of_a_step_is_that_of_mixed_images(images: ClassImages) -> None:
    torch.manual_seed(0)
    model = StemViT(2, 8, 1, 2).eval()
    rows = torch.randn(6, 2, 64, 112).half()
    labels = torch.tensor(images.labels)
    t = replace(SMALL, mixup=0.3, smoothing=0.1, batch_size=6)
    loss = stem_training._step_loss(model, [rows.numpy()], labels, t, 3)
    order = torch.randperm(6, generator=seeding.generator(0, "order", 3))
    generator = seeding.generator(0, "step", 3)
    side = torch.randint(2, (6,), generator=generator)
    x = rows[order, side].float()
    other = torch.randperm(6, generator=generator)
    share = float(np.random.default_rng(seeding.derive(0, "mixup", 3)).beta(0.3, 0.3))
    logp = model.transformer(share * x + (1 - share) * x[other]).log_softmax(1)
    hot = nn.functional.one_hot(labels[order], 2).float()
    target = 0.9 * (share * hot + (1 - share) * hot[other]) + 0.1 / 2
    torch.testing.assert_close(loss, -(target * logp).sum(1).mean())


def test_a_killed_training_goes_on_to_the_same_weights(
    images: ClassImages, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: str) -> dict[str, Tensor]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        return trained_stem_vit(images, TINY_FIT, SMALL, weights).state_dict()

    whole = trained("whole")
    left = [path.name for path in cache.folder().iterdir()]
    assert len(left) == 1 and left[0].startswith("stem-vit-")  # parts and checkpoints are gone
    monkeypatch.setattr(stem_training, "CHECKPOINT_S", 0.0)
    real, done = stem_training._step_loss, []

    def killed(*args: object) -> Tensor:
        done.append(args[-1])
        if done == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stem_training, "_step_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("killed")
    again = trained("killed")
    assert done == [0, 1, 2, 2, 3]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    values = torch.load(weights, weights_only=True)
    assert torch.equal(again["stem.0.weight"], values["conv_stem.weight"])
    untrained = StemViT(2, 8, 1, 2, 1.0).state_dict()
    assert not torch.equal(again["head.weight"], untrained["head.weight"])


@pytest.mark.parametrize(
    ("option", "message"),
    [({"heads": 3}, "heads 3 do not divide the width 8"), ({"epochs": 0.0}, "epochs 0.0 must be"),
     ({"depth": 0}, "depth 0")],
)  # fmt: skip
def test_settings_that_cannot_work(
    option: dict[str, float], message: str, images: ClassImages, weights: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trained_stem_vit(images, TINY_FIT, replace(SMALL, **option), weights)  # type: ignore[arg-type]

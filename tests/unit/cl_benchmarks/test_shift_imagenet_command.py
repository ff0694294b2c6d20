"""`python -m dynmoe.tta --data imagenet` on small trees, with weights from a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from shift_trees import SYNSETS, image, tree

from cl_benchmarks.shifts.domain import read_image
from cl_benchmarks.shifts.imagenet import Imagenet, subset
from cl_benchmarks.shifts.stream import make_stream
from dynmoe.errors import UserError
from dynmoe.experiments.tta.source_model import normalise
from dynmoe.tta.__main__ import main

MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-R, many of whose images lie in the class that the model sees; its weights."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    torch.nn.init.normal_(model.head.weight)  # so that answers differ
    torch.save(model.state_dict(), folder / "weights.pth")
    for number, wnid in enumerate(SYNSETS["r"]):
        image(folder / "imagenet-r" / wnid / "a.jpg", 256, 256, seed=number)
    for number in range(25):
        path = image(folder / "new.jpg", 256, 256, seed=1000 + number)
        x = normalise(read_image(path, 256, 224)[None], (0.5,) * 3, (0.5,) * 3)
        with torch.no_grad():
            seen = int(model(x)[0, subset("rendition")].argmax())
        path.rename(folder / "imagenet-r" / SYNSETS["r"][seen] / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("labels", [pytest.param("all-1000", marks=pytest.mark.slow), "subset"])
def test_both_protocols(labels: str, root: Path, tmp_path: Path) -> None:
    flags = (
        f"--preset imagenet --data-dir {root} --weights {root}/weights.pth --model {MODEL} "
        f"--streams rendition --seeds 1 --compare noadapt --batch-size 8 --limit 16 --threads 1 "
        f"--window 1 --routing-batches 0 --labels {labels} --runs-dir {tmp_path}"
    )
    main(flags.split())
    (file,) = (tmp_path / "tta").glob("imagenet-*/results.json")
    results = json.loads(file.read_text())
    seeds = {
        name: json.loads((tmp_path / "tta" / entry["runs"] / "seed-0/summary.json").read_text())
        for name, entry in results["streams"]["rendition"].items()
    }
    assert seeds["noadapt"]["domains"].keys() == {"rendition"}
    assert (seeds["moetta"]["steps"], seeds["moetta"]["images"]) == (2, 16)
    model = timm.create_model(MODEL, checkpoint_path=str(root / "weights.pth")).eval()

    source = Imagenet(root)
    stream = make_stream(source, "rendition", batch_size=8, limit=16, seed=0)
    indices = source.other("rendition").labels
    right = 0
    for number in range(len(stream)):
        batch = stream.batch(number)
        with torch.no_grad():
            logits = model(normalise(batch.images, (0.5,) * 3, (0.5,) * 3))
        if labels == "subset":
            logits = torch.full_like(logits, -1e9).index_copy(1, indices, logits[:, indices])
        right += int((logits.argmax(1) == batch.labels).sum())
    assert seeds["noadapt"]["accuracy"] == right / 16
    assert right or labels == "all-1000"


def test_a_model_for_other_sizes_is_refused(root: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    flags = f"--preset imagenet --data-dir {root} --weights {tmp_path}/w.pth --model test_vit"
    with pytest.raises(UserError, match="160 pixels, and the streams have 224"):
        main(flags.split())


def _flags(root: Path, runs: Path, extra: str) -> list[str]:
    """One method on small batches of few images; `extra` comes last, and wins."""
    return (
        f"--preset imagenet --data-dir {root} --weights {root}/weights.pth --model {MODEL} "
        f"--streams rendition --seeds 1 --compare --method noadapt --batch-size 8 --limit 200 "
        f"--threads 1 --window 1 --gates 0 --allow-unused --runs-dir {runs} {extra}"
    ).split()


def _other_set(root: Path) -> None:
    tree(root / "imagenet-a", SYNSETS["r"], root / "a.jpg")


def _no_severity(root: Path) -> None:
    (root / "imagenet-c" / "gaussian_noise" / "3").mkdir(parents=True)


def _ten_classes(root: Path) -> None:
    torch.save(timm.create_model(MODEL, num_classes=10).state_dict(), root / "ten.pth")


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (_ten_classes, "--weights {root}/ten.pth", r"size mismatch for head.weight: .*10, 192"),
        (None, "--streams classical", "no imagenet-c in"),
        (_no_severity, "--streams classical", "no severity 5 of gaussian_noise in .*; there: 3"),
        (_other_set, "--streams adversarial", "200 class folders of its set: 114 are missing"),
    ],
)
def test_what_does_not_fit_is_told_before_any_run(
    spoil: Callable[[Path], None] | None, flags: str, message: str, root: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "imagenet-r").symlink_to(root / "imagenet-r")
    (data / "weights.pth").symlink_to(root / "weights.pth")
    image(data / "a.jpg", 256, 256)
    if spoil is not None:
        spoil(data)
    with pytest.raises(UserError, match=message) as caught:
        main(_flags(data, tmp_path / "runs", flags.format(root=data)))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--batch-size 1", "--batch-size 8 --limit 17"])
def test_a_batch_of_one_where_batchnorm_needs_two(flags: str, root: Path, tmp_path: Path) -> None:
    """Also the last of a stream, which else would show after hours."""
    model = "mobilenetv3_small_050"
    torch.save(timm.create_model(model).state_dict(), tmp_path / "w.pth")
    extra = f"--model {model} --weights {tmp_path}/w.pth {flags}"
    with pytest.raises(UserError, match=r"tent .*at least 2 images, .* stream rendition has 1"):
        main(_flags(root, tmp_path / "runs", f"{extra} --method tent"))
    assert not (tmp_path / "runs").exists()
    main(_flags(root, tmp_path / "runs", f"{extra} --limit 3"))  # noadapt can
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    assert json.loads(summary.read_text())["images"] == 3


def test_a_damaged_image_is_named_and_the_run_goes_on_once_it_is_whole(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "imagenet-r", tmp_path / "imagenet-r")
    (segment,) = make_stream(Imagenet(tmp_path), "rendition", limit=8, seed=0).segments
    damaged = segment.domain.files[int(segment.indices[3])]  # type: ignore[attr-defined]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    argv = _flags(tmp_path, tmp_path / "runs", f"--limit 8 --weights {root}/weights.pth")
    with pytest.raises(UserError, match=f"cannot read image {damaged}: .*; restore or delete"):
        main(argv)
    damaged.write_bytes(whole)
    main(argv)
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    assert json.loads(summary.read_text())["images"] == 8


def test_batches_without_a_finite_loss_are_counted_and_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = (
        "--compare tent --method moetta --method.num-experts 2 --lr-scale 1e30 --batch-size 2 "
        "--limit 6 --routing-batches 1"
    )
    main(_flags(root, tmp_path, extra))
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    results = {summary["method"]: summary for summary in found}
    skipped = {name: summary["skipped"] for name, summary in results.items()}
    assert skipped["tent"] == 2  # all after the first
    told = f"their loss was not finite: {sum(skipped.values())}\n"
    assert told in capsys.readouterr().out
    routings = results["moetta"]["routings"]
    assert routings["random"]["loss"] is None and routings["best"]["accuracy"] >= 0

"""`python -m dynmoe.tta --data imagenet` on small trees, with weights from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from shift_trees import SYNSETS, image

from cl_benchmarks.shifts.domain import read_image
from cl_benchmarks.shifts.imagenet import Imagenet, subset
from cl_benchmarks.shifts.source import make_stream
from dynmoe.errors import UserError
from dynmoe.tta.__main__ import main
from dynmoe.tta.source_model import normalise

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


@pytest.mark.parametrize("labels", ["all-1000", "subset"])
def test_both_protocols(labels: str, root: Path, tmp_path: Path) -> None:
    flags = (
        f"--preset imagenet --data-dir {root} --weights {root}/weights.pth --model {MODEL} "
        f"--streams rendition --seeds 1 --compare noadapt --batch-size 8 --limit 16 --threads 1 "
        f"--window 1 --labels {labels} --runs-dir {tmp_path}"
    )
    main(flags.split())
    results = json.loads((tmp_path / "tta" / "imagenet" / "results.json").read_text())
    seeds = {name: by["rendition"]["seeds"][0] for name, by in results["methods"].items()}
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

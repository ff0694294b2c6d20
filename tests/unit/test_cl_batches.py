"""Batches of one image: refused before training where the network has BatchNorm."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe import cl
from dynmoe.errors import UserError

FLAGS = (
    "--preset smoke --chunks 2 --epochs 1 --compare --eval-samples 20 --probe-samples 10 --name x"
)


def _run(runs: Path, *flags: str) -> None:
    cl.main([*FLAGS.split(), "--runs-dir", str(runs), *flags])


@pytest.mark.parametrize(
    ("size", "images", "message"),
    [
        (1, 20, r"a batch of task 1 \(20 images\) has 1; .*now 1; 2 works"),
        (4, 21, r"a batch of task 1 \(21 images\) has 1; .*now 4; 6 works"),
        (20, 21, r"a batch of task 1 \(21 images\) has 1; .*now 20; 21 works"),
        (4, 1, r"a batch of task 1 \(1 images\) has 1; .*now 4\)"),
    ],
)
def test_a_batch_of_one_is_refused_with_batch_norm(
    size: int, images: int, message: str, tmp_path: Path
) -> None:
    flags = ("--network", "resnet18", "--network.width", "8", "--network.hidden", "8")
    with pytest.raises(UserError, match=f"resnet18 has BatchNorm.*{message}") as caught:
        _run(tmp_path, *flags, "--batch-size", str(size), "--protocol.images", str(images))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pt"))


def test_other_batches_and_other_networks_are_trained(tmp_path: Path) -> None:
    resnet = ("--network", "resnet18", "--network.width", "8", "--network.hidden", "8")
    _run(tmp_path / "a", *resnet, "--batch-size", "5", "--protocol.images", "12")
    _run(tmp_path / "b", "--batch-size", "1", "--protocol.images", "10")
    assert len(list(tmp_path.rglob("summary.json"))) == 2

"""Cross entropy over all classes, those seen, and those present."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expansion_helpers import config, quietly_import_avalanche

from cl_benchmarks.experiment import ContinualLearning
from cl_benchmarks.images import ImageData
from cl_benchmarks.losses import StreamLoss, check_loss
from cl_benchmarks.settings import check_without_tasks
from dynmoe import cl
from dynmoe.errors import UserError
from dynmoe.lab.runner import run_one
from dynmoe.registry import get

TASKS: list[Any] = [[0, 3], [1, 5]]
"""Classes of two tasks, of six."""
quietly_import_avalanche()


@pytest.mark.parametrize(
    ("over", "extra", "counted"),
    [
        ("all", [], [0, 1, 2, 3, 4, 5]), ("seen", [], [0, 1, 3, 5]), ("present", [], [1, 5]),
        ("present", [0], [0, 1, 5]), ("seen", [0], [0, 1, 3, 5]),
    ],
)  # fmt: skip
def test_which_logits_count(over: Any, extra: list[int], counted: list[int]) -> None:
    """The loss is the cross entropy among those; the others get no gradient at all."""
    loss = StreamLoss(over)
    loss.task_starts(TASKS)
    labels = torch.tensor([1, 5, 1, *extra])
    logits = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    value = loss(logits, labels)
    place = torch.tensor([counted.index(label) for label in labels.tolist()])
    torch.testing.assert_close(value, F.cross_entropy(logits[:, counted], place))
    (gradient,) = torch.autograd.grad(value, logits)
    touched = gradient.abs().sum(dim=0) > 0
    assert touched.nonzero()[:, 0].tolist() == counted
    assert torch.isfinite(gradient).all()


def test_all_is_plain_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(StreamLoss()(logits, labels), F.cross_entropy(logits, labels))


def test_no_effect_is_refused() -> None:
    whole, half = torch.tensor([0, 1, 2, 2]), torch.tensor([2, 1, 1])
    check_loss("all", [whole], 3, "iid")
    check_loss("seen", [half, whole], 3, "iid")
    check_loss("present", [half, whole], 3, "iid")
    check_loss("present", [whole, half], 3, "iid")
    for over, tasks in (("seen", [whole, half]), ("present", [whole, whole])):
        with pytest.raises(UserError, match=f"--loss-over {over} has no effect: .*protocol iid"):
            check_loss(over, tasks, 3, "iid")  # type: ignore[arg-type]
    online = replace(cl.presets()["online"], loss_over="seen")
    with pytest.raises(UserError, match="--loss-over all"):
        check_without_tasks(online)


# ---------------------------------------------------------------- in runs


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def trained(runs: Path, data: ImageData, over: str, intervention: Any = "none") -> dict[str, Any]:
    """The summary of a short run."""
    one = config(
        runs, method="dense", intervention=intervention, protocol=("class", {"head": "full"}),
        loss_over=over, name=over, epochs=4, lr=0.01,
    )  # fmt: skip
    return run_one(ContinualLearning(), "x", one, data).summary


def kept(summary: dict[str, Any]) -> float:
    """Accuracy on old tasks, mean over the tasks."""
    old = [row["old_accuracy"] for row in summary["tasks"][1:]]
    return sum(old) / len(old)


def test_old_classes_are_left_alone_and_kept_better(digits: ImageData, tmp_path: Path) -> None:
    """Five tasks of two digits: separated softmax forgets less than that over all classes."""
    found = {over: trained(tmp_path, digits, over) for over in ("all", "seen", "present")}
    assert kept(found["present"]) > kept(found["all"]) + 0.1
    assert found["all"]["accuracy_matrix"] != found["seen"]["accuracy_matrix"]


def test_the_replayed_classes_are_present(digits: ImageData, tmp_path: Path) -> None:
    """With replay, classes of old images in a batch are told from the new ones."""
    replay = trained(tmp_path, digits, "present", ("replay", {"size": 60}))
    assert sum(replay["accuracy_matrix"]["after"][-1]) / 5 > 0.5


def test_a_run_that_cannot_use_it_is_refused(digits: ImageData, tmp_path: Path) -> None:
    one = config(tmp_path, method="dense", protocol="iid", loss_over="present", chunks=4)
    with pytest.raises(UserError, match="every task of protocol iid has all 10 classes"):
        run_one(ContinualLearning(), "x", one, digits)

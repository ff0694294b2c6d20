"""Source images before the stream: batches of any kind, and no trace of a failure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tta_models import resnet, stream, vit
from tta_options import each_method, make, same

from dynmoe.errors import UserError
from dynmoe.tta import Adapter, adapt

IMAGES = stream(2, size=4, seed=7)
LABELS = torch.zeros(4, dtype=torch.int64)
FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: IMAGES,
    "generator": lambda: (images for images in IMAGES),
    "tuples": lambda: [(images, LABELS) for images in IMAGES],
    "labels first": lambda: [[LABELS, images] for images in IMAGES],
    "dicts": lambda: [{"label": LABELS, "pixel_values": images} for images in IMAGES],
    "DataLoader": lambda: DataLoader(TensorDataset(torch.cat(IMAGES)), batch_size=4),
    "other dtype": lambda: [images.float() for images in IMAGES],
}


def eata(model: nn.Module | None = None) -> Adapter:
    return make("eata", model, fisher_weight=2000.0)


def fisher(adapter: Adapter, batches: Any) -> Tensor:
    adapter.observe_source(batches)
    return torch.cat([f.flatten() for f in adapter.memory["fisher"]])


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_kind(form):
    close = {"rtol": 1e-4, "atol": 1e-6} if form == "other dtype" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(fisher(eata(), FORMS[form]()), fisher(eata(), IMAGES), **close)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_s_mode_does_not_matter(mode):
    model = vit()
    with mode():
        adapter = eata(model)
        found = fisher(adapter, [images.clone() for images in IMAGES])
        adapter.reset()
    same(found.clone(), fisher(eata(), IMAGES))
    for images in stream(2):
        assert adapter(images).isfinite().all()
    assert adapter.steps == 2


def test_dropout_is_off_and_flags_stay():
    model = nn.Sequential(vit(), nn.Dropout(0.5))
    adapter = eata(model.train())
    adapter.model.train()
    before = copy.deepcopy(adapter.model.state_dict())
    drawn = torch.get_rng_state()
    same(fisher(adapter, IMAGES), fisher(eata(), IMAGES))
    assert all(module.training for module in adapter.model.modules())
    same(dict(adapter.model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_one_image_is_a_batch_where_a_call_takes_one():
    assert fisher(eata(), [images[:1] for images in IMAGES]).any()
    with pytest.raises(UserError, match="at least 2 images"):
        fisher(eata(resnet()), [torch.randn(1, 3, 32, 32, dtype=torch.double)])


def test_a_half_model_s_fisher_information_is_of_float32():
    found = fisher(eata(vit().half()), [images.half() for images in IMAGES])
    assert found.dtype == torch.float32
    due = fisher(eata(), IMAGES).float()
    assert nn.functional.cosine_similarity(found, due, dim=0) > 0.98


def broken() -> Iterator[Tensor]:
    yield IMAGES[0]
    raise ValueError("no such file")


BAD = [
    ([], UserError, "no source images were given"),
    (iter(()), UserError, "no source images were given"),
    (torch.zeros(4, 3, 16, 16), UserError, "takes batches, such as"),
    (3, UserError, "takes batches, such as"),
    ([IMAGES[0], IMAGES[1][0]], UserError, "are no batch"),
    ([IMAGES[0], IMAGES[1][:0]], UserError, "are no batch"),
    ([IMAGES[0], (LABELS, LABELS)], UserError, "a tuple without a tensor of images"),
    ([{"label": LABELS}], UserError, "a dict without a tensor of images"),
    ([IMAGES[0], IMAGES[1] * float("nan")], UserError, "source batch 2 are not finite"),
    ([IMAGES[0], IMAGES[1][:, :2]], RuntimeError, "channels"),
    (broken(), ValueError, "no such file"),
]


@pytest.mark.parametrize(("batches", "error", "message"), BAD)
def test_after_a_failure_all_is_as_before(batches, error, message):
    adapter, twin = eata(), eata()
    for one in (adapter, twin):
        one.observe_source(IMAGES)
        one(stream(1)[0])
    modes = [module.training for module in adapter.modules()]
    with pytest.raises(error, match=message):
        adapter.observe_source(batches)
    assert modes == [module.training for module in adapter.modules()]
    same(dict(adapter.state_dict()), dict(twin.state_dict()))
    same(adapter(stream(1, seed=3)[0]), twin(stream(1, seed=3)[0]))
    adapter.reset()
    twin.reset()
    same(dict(adapter.state_dict()), dict(twin.state_dict()))


@each_method
def test_methods_without_use_for_the_source_do_not_read_it(method):
    adapter = adapt(vit(), method, **({"fisher_weight": 0.0} if method == "eata" else {}))
    assert adapter.source_images == 0
    adapter.observe_source(broken())
    assert adapter(IMAGES[0]).isfinite().all()

"""What all methods share: resume, reset, bad losses, kinds of models, bad input."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from tta_models import CLASSES, convnext, resnet, stream, vit
from tta_options import LEARNERS, each_learner, each_method, make, same

import dynmoe
from dynmoe.errors import UserError
from dynmoe.tta import Adapter, adapt


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in adapter.model.state_dict().items()}


@each_method
@pytest.mark.parametrize("at", [1, 4])
def test_a_run_goes_on_bit_for_bit(method, at):
    batches, whole = stream(7), make(method)
    outputs = [whole(images) for images in batches]
    first = make(method)
    for images in batches[:at]:
        first(images)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = make(method)
    again(stream(1, seed=9)[0])  # what it has seen is forgotten
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for images, expected in zip(batches[at:], outputs[at:], strict=True):
        same(again(images), expected)
    same(weights(again), weights(whole))
    assert (again.steps, again.skipped) == (whole.steps, whole.skipped)
    assert whole.steps == (7 if method in LEARNERS else 0)


@each_method
def test_reset_goes_back_to_the_start(method):
    adapter, batches = make(method), stream(5)
    start = weights(adapter)
    first = [adapter(images) for images in batches]
    assert method == "noadapt" or any(
        not torch.equal(start[k], v) for k, v in weights(adapter).items()
    )
    adapter.reset()
    assert (adapter.steps, adapter.skipped) == (0, 0)
    same({k: v for k, v in weights(adapter).items() if "noise.drawn" not in k},
         {k: v for k, v in start.items() if "noise.drawn" not in k})  # fmt: skip
    for images, expected in zip(batches, first, strict=True):
        same(adapter(images), expected)


@each_method
def test_modes_and_gradients_of_the_caller_do_not_matter(method):
    plain, batches = make(method), stream(3)
    expected = [plain(images) for images in batches]
    for caller in (torch.no_grad, torch.inference_mode):
        adapter = make(method)
        adapter.train(caller is torch.no_grad)
        with caller():
            outputs = [adapter(images.clone()) for images in batches]
        for got, want in zip(outputs, expected, strict=True):
            assert got.shape == (6, CLASSES) and not got.requires_grad
            same(got.clone(), want)


@each_learner
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(method, bad):
    adapter, twin, batches = make(method), make(method), stream(5)
    spoilt = batches[1].clone()
    spoilt[2, 0, 3, 3] = bad
    adapter(batches[0])
    twin(batches[0])
    before = weights(adapter)
    adapter(spoilt)
    assert (adapter.steps, adapter.skipped) == (1, 1)
    after = weights(adapter)
    same({k: v for k, v in after.items() if "noise" not in k},
         {k: v for k, v in before.items() if "noise" not in k})  # fmt: skip
    if method not in ("cotta", "becotta"):  # which have drawn random numbers for the batch
        for images in batches[2:]:
            same(adapter(images), twin(images))
    assert adapter(batches[3]).isfinite().all()


@each_learner
@pytest.mark.parametrize("make_model", [convnext, resnet, lambda: resnet(group_norm=True)])
def test_models_of_other_kinds(method, make_model):
    model = make_model()
    blocks = any(name.endswith("blocks") for name, _ in model.named_modules())
    last = any(type(m).__name__ == "LayerNorm" for m in model.modules())
    options = {"keep": 0} if method == "moetta" else {}
    if (method == "becotta" and not blocks) or (method == "moetta" and not last):
        with pytest.raises(UserError, match=f"{method} puts experts"):
            make(method, model, **options)
        return
    adapter = make(method, model, **options)
    start = weights(adapter)
    for images in stream(3, side=32):
        assert adapter(images).isfinite().all()
    assert adapter.steps == 3
    changed = {
        name for name, value in weights(adapter).items() if not torch.equal(value, start[name])
    }
    assert changed
    if method in ("tent", "eata", "sar", "deyo"):
        assert {name.rsplit(".", 1)[1] for name in changed} <= {"weight", "bias"}


def test_batchnorm_uses_the_batch_s_statistics():
    adapter, images = make("tent", resnet()), stream(1, side=32)[0]
    same(adapter(images), resnet().train()(images).detach())
    with pytest.raises(UserError, match="at least 2 images"):
        adapter(images[:1])
    source = make("noadapt", resnet())
    same(source(images), resnet()(images).detach())
    source(images[:1])


@each_method
def test_a_batch_of_one(method):
    adapter = make(method)
    assert adapter(stream(1, size=1)[0]).shape == (1, CLASSES)
    assert adapter.skipped == 0


@each_method
@pytest.mark.parametrize("shape", [(3, 16, 16), (0, 3, 16, 16)])
def test_what_is_no_batch_is_refused(method, shape):
    with pytest.raises(UserError, match="are no batch"):
        make(method)(torch.zeros(shape, dtype=torch.double))


@each_learner
def test_a_model_without_normalisation_layers(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    if method == "cotta":
        make(method, model)(torch.randn(4, 3, 2, 2))
        return
    with pytest.raises(UserError) as caught:
        make(method, model)
    assert method in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapt(vit(), "tnet"), "Did you mean 'tent'"),
        (lambda: adapt(vit(), "tent", learning_rate=1.0), "unknown option of tent 'learning_rate'"),
        (lambda: adapt(vit(), "mgtta"), "mgtta moves weights by a learned optimizer"),
        (lambda: adapt(vit(), "sar", rho=-1.0), "rho=-1"),
        (lambda: adapt(vit(), "deyo", grid=0), "grid=0"),
        (lambda: adapt(vit(), "cotta", views=0), "views=0"),
        (lambda: adapt(vit(), "cotta", restore=2.0), "restore=2"),
        (lambda: adapt(vit(), "becotta", num_experts=0), "num_experts=0"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_adapters_can_be_copied_and_reached_from_the_package():
    adapter = dynmoe.tta.adapt(vit(), method="moetta")
    assert isinstance(adapter, dynmoe.tta.Adapter)
    copied = copy.deepcopy(adapter)
    for images in stream(3):
        same(copied(images), adapter(images))


@each_method
def test_float32_and_half_precision(method):
    images = stream(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = make(method, vit().float())
        for batch in images:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = adapter(batch.float())
            assert logits.isfinite().all()
    assert adapter.skipped == 0
    assert all(p.isfinite().all() for p in adapter.parameters())

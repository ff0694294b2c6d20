"""CoTTA and BECoTTA against naive restatements in float64, and CoTTA's views."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tta_models import NaiveSGD, shannon, stream, vit

from dynmoe.errors import UserError
from dynmoe.tta import adapt
from dynmoe.tta.methods.becotta import BlockExperts
from dynmoe.tta.methods.cotta import augment
from dynmoe.tta.methods.reliable import occlude, shuffle_patches, shuffle_pixels

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def trained_of(model: nn.Module) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] in ("weight", "bias")]


@pytest.mark.parametrize("restore", [0.0, 1.0])
@pytest.mark.parametrize("confidence", [0.0, 0.99])
def test_cotta(restore, confidence):
    options = {"lr": 0.01, "teacher_decay": 0.8, "views": 3, "seed": 5}
    adapter = adapt(vit(), "cotta", restore=restore, confidence=confidence, **options)
    student, teacher, source = vit(), vit().requires_grad_(False), vit().requires_grad_(False)
    trained = trained_of(student)
    sgd, generator = NaiveSGD(trained, 0.01, 0.9), torch.Generator().manual_seed(5)
    for images in stream(4):
        z, sure = student(images), source(images).softmax(1).amax(1).mean()
        assert 0 < sure < 0.99
        if sure < confidence:
            target = sum(teacher(augment(images, generator)) for _ in range(3)) / 3
        else:
            target = teacher(images)
        loss = 0
        for row, other in zip(z, target, strict=True):
            p, q = row.softmax(0), other.softmax(0)
            loss = loss - sum(0.5 * q[c] * p[c].log() + 0.5 * p[c] * q[c].log() for c in range(10))
        sgd.step(torch.autograd.grad(loss / len(z), trained))
        with torch.no_grad():
            for slow, fast in zip(trained_of(teacher), trained, strict=True):
                slow.copy_(0.8 * slow + 0.2 * fast)
            for p, first in zip(trained, trained_of(source), strict=True):
                torch.rand(p.shape, generator=generator, dtype=torch.float32)
                p.copy_(first if restore else p)
        torch.testing.assert_close(adapter(images), target, **CLOSE)
    for (name, got), want in zip(
        adapter.model.named_parameters(), student.parameters(), strict=True
    ):
        torch.testing.assert_close(got.detach(), want.detach(), msg=name, **CLOSE)
    assert torch.equal(adapter.model.pos_embed, vit().pos_embed)


def test_cotta_restores_a_share_of_the_numbers():
    adapter = adapt(vit(), "cotta", restore=0.3, lr=0.1)
    adapter(stream(1)[0])
    source = dict(vit().named_parameters())
    same = torch.cat([(p == source[n]).flatten() for n, p in adapter.trained.items()])
    assert abs(same.double().mean().item() - 0.3) < 0.03


def test_views_are_images_differ_and_repeat():
    images = torch.rand(2, 3, 16, 16)
    first = augment(images, torch.Generator().manual_seed(1))
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))
    assert augment(images[:, :1], torch.Generator()).shape == (2, 1, 16, 16)
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        augment(torch.rand(2, 4, 16, 16), torch.Generator())


def test_destroyed_images_keep_their_colours():
    images, generator = torch.rand(3, 3, 16, 24), torch.Generator().manual_seed(0)
    for mixed in (shuffle_patches(images, 4, generator), shuffle_pixels(images, generator)):
        assert mixed.shape == images.shape and not torch.equal(mixed, images)
        assert torch.equal(mixed.flatten(2).sort().values, images.flatten(2).sort().values)
    assert shuffle_patches(torch.rand(2, 3, 18, 17), 4, generator).shape == (2, 3, 18, 17)
    hidden = occlude(images, 0.5)
    assert torch.allclose(
        hidden[:, :, 4:12, 6:18], images.mean((2, 3), keepdim=True).expand(3, 3, 8, 12)
    )
    assert torch.equal(hidden[:, :, :4], images[:, :, :4])


def naive_adapters(
    module: BlockExperts, y: Tensor, parts: dict[str, Tensor], noise: nn.Module
) -> Tensor:
    """One sample, then one token after the other."""
    with torch.no_grad():  # as the gates, which do not learn
        drawn = noise.normal(y.new_empty(*y.shape[:2], len(module.gate)))
    out = []
    for sample, random in zip(y.detach(), drawn, strict=True):
        noisy = sample @ module.gate.T + random * F.softplus(sample @ module.gate_noise.T)
        out.append(int(noisy.sum(0).argmax()))
    rows = []
    for sample, e in zip(y, out, strict=True):
        hidden = [F.gelu(token @ parts["down"][e] + parts["down_bias"][e]) for token in sample]
        change = [h * parts["up"][e] + parts["up_bias"][e] for h in hidden]
        rows.append(sample + torch.stack(change))
    return torch.stack(rows)


def test_becotta():
    adapter = adapt(vit(), "becotta", lr=1e-2, margin=1.2, num_experts=3)
    model, modules = vit().requires_grad_(False), list(adapter.model.blocks)
    names = ("down", "up", "down_bias", "up_bias")
    parts = [{n: getattr(m, n).detach().clone().requires_grad_() for n in names} for m in modules]
    assert abs(modules[0].up.std().item() - 0.02) < 0.005
    trained = [p[n] for p in parts for n in names]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    unsure = 0
    for step, images in enumerate(stream(4), start=1):
        noises = [copy.deepcopy(m.noise) for m in modules]
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block, module, part, noise in zip(model.blocks, modules, parts, noises, strict=True):
            x = naive_adapters(module, block(x), part, noise)
        logits = model.forward_head(model.norm(x))
        h = [v for v in map(shannon, logits) if v < 1.2]
        unsure += len(logits) - len(h)
        gradients = torch.autograd.grad(sum(h) / len(h), trained)
        with torch.no_grad():
            for p, g, m, v in zip(trained, gradients, first, second, strict=True):
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                p -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(adapter(images), logits.detach(), **CLOSE)
    assert unsure and adapter.steps == 4
    for module, part in zip(modules, parts, strict=True):
        for name in names:
            torch.testing.assert_close(getattr(module, name).detach(), part[name].detach(), **CLOSE)


def test_becotta_trains_adapters_alone():
    adapter = adapt(vit(), "becotta")
    names = {n.rsplit(".", 1)[1] for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert names == {"down", "up", "down_bias", "up_bias"}

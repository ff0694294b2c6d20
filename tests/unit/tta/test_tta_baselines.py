"""Tent, EATA, SAR and DeYO against naive restatements in float64, over several steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from tta_models import CLASSES, NaiveSGD, affines, shannon, stream, vit

from dynmoe.errors import UserError
from dynmoe.tta import adapt

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LN_C = math.log(CLASSES)
RARE = 1e-9  # an option that trusts nobody


def same_weights(adapter, model) -> None:
    """All parameters of the adapted model are those of the naive one."""
    for (name, got), want in zip(adapter.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), msg=name, **CLOSE)


def test_noadapt_is_the_source_model():
    model, images = vit(), stream(1)[0]
    adapter = adapt(model, "noadapt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(adapter(images), vit()(images))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert adapter.steps == 0


@pytest.mark.parametrize(("reliable", "im"), [(False, 0.0), (True, 0.0), (False, 1.0), (True, 0.3)])
def test_tent(reliable, im):
    adapter, model = adapt(vit(), "tent", lr=0.01, reliable=reliable, im=im), vit()
    trained, kept = affines(model), 0
    sgd = NaiveSGD(trained, 0.01, 0.9)
    for images in stream(5):
        logits = model(images)
        h = [shannon(row) for row in logits]
        h = [v for v in h if not reliable or v < 0.4 * LN_C]
        mean = sum(row.exp() / row.exp().sum() for row in logits) / len(logits)
        loss = sum(h) / len(h) + im * sum(q * q.log() for q in mean)
        sgd.step(torch.autograd.grad(loss, trained))
        torch.testing.assert_close(adapter(images), logits.detach(), **CLOSE)
        kept += len(h)
    same_weights(adapter, model)
    assert adapter.steps == 5 and (0 < kept < 30) == reliable


def test_tent_refuses_a_negative_weight():
    with pytest.raises(UserError, match="im=-1"):
        adapt(vit(), "tent", im=-1.0)


def naive_fisher(model, trained, batches) -> list[Tensor]:
    squares = []
    for images in batches:
        logits = model(images)
        nll = [-row.log_softmax(0)[int(row.argmax())] for row in logits]
        gradients = torch.autograd.grad(sum(nll) / len(nll), trained)
        squares.append([g**2 for g in gradients])
    return [sum(column) / len(squares) for column in zip(*squares, strict=True)]


@pytest.mark.parametrize("with_fisher", [False, True])
def test_eata(with_fisher):
    options = {"lr": 0.01, "redundancy": 0.6, "fisher_weight": 20.0 * with_fisher}
    adapter, model = adapt(vit(), "eata", **options), vit()
    trained = affines(model)
    origin = [p.detach().clone() for p in trained]
    fisher = [torch.zeros_like(p) for p in trained]
    if with_fisher:
        assert adapter.source_images == 2000
        source = stream(3, seed=7)
        adapter.observe_source(source)
        fisher = naive_fisher(model, trained, source)
        assert max(f.max() for f in fisher) > 1e-3
    sgd, q, e0, redundant = NaiveSGD(trained, 0.01, 0.9), None, 0.4 * LN_C, 0
    unsure = 0
    for images in stream(8):
        logits = model(images)
        h, p = [shannon(row) for row in logits], logits.detach().softmax(dim=1)
        chosen = [b for b in range(len(h)) if h[b] < e0]
        unsure += len(h) - len(chosen)
        if q is not None:
            cosine = [float(q @ row / q.norm() / row.norm()) for row in p]
            redundant += sum(abs(cosine[b]) >= 0.6 for b in chosen)
            chosen = [b for b in chosen if abs(cosine[b]) < 0.6]
        torch.testing.assert_close(adapter(images), logits.detach(), **CLOSE)
        if not chosen:
            continue
        mean = sum(p[b] for b in chosen) / len(chosen)
        q = mean if q is None else 0.9 * q + 0.1 * mean
        loss = sum((e0 - h[b].detach()).exp() * h[b] for b in chosen) / len(chosen)
        drift = zip(fisher, trained, origin, strict=True)
        loss = loss + 20 * sum((f * (p - o) ** 2).sum() for f, p, o in drift)
        sgd.step(torch.autograd.grad(loss, trained))
        torch.testing.assert_close(adapter.memory["average"], q, **CLOSE)
    assert redundant and unsure and adapter.steps > 3
    same_weights(adapter, model)


def test_eata_does_nothing_without_trusted_samples():
    adapter = adapt(vit(), "eata", fisher_weight=0.0, redundancy=RARE)
    images = stream(1)[0]
    adapter(images)  # the first batch knows no average yet
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    average = adapter.memory["average"].clone()
    adapter(images)
    assert (adapter.steps, adapter.skipped) == (1, 0)
    torch.testing.assert_close(dict(adapter.model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(adapter.memory["average"], average)


def test_eata_says_that_it_has_no_fisher_information():
    adapter = adapt(vit(), "eata")
    with pytest.warns(UserWarning, match="no source images"):
        adapter(stream(1)[0])
    with pytest.raises(UserError, match="no source images were given"):
        adapter.observe_source([])


def test_a_reset_keeps_what_the_source_taught():
    adapter = adapt(vit(), "eata", redundancy=2.0)
    adapter.observe_source(stream(2, seed=7))
    first = [adapter(images) for images in stream(3)]
    adapter.reset()
    assert adapter.memory["average"] is None and adapter.memory["fisher"] is not None
    for images, expected in zip(stream(3), first, strict=True):
        assert torch.equal(adapter(images), expected)


@pytest.mark.parametrize("setting", ["paper", "official"])
@pytest.mark.parametrize("reset_below", [0.2, 0.67, 9.0])
def test_sar(setting, reset_below):
    """0.67 makes some of the steps resets, 9 all of them."""
    adapter = adapt(vit(), "sar", setting=setting, lr=0.02, rho=1.0, reset_below=reset_below)
    model, official = vit(), setting == "official"
    affines(model)
    trained = [p for n, p in model.named_parameters() if "norm" in n and n.split(".")[0] != "norm"]
    start = [p.detach().clone() for p in trained]
    sgd, average, e0, resets = NaiveSGD(trained, 0.02, 0.9), None, 0.4 * LN_C, 0
    others = 0
    for images in stream(7):
        first = model(images)
        h = [shannon(row) for row in first]
        s1 = [b for b in range(len(h)) if h[b] < e0]
        g = torch.autograd.grad(sum(h[b] for b in s1) / len(s1), trained)
        norm = sum((x**2).sum() for x in g).sqrt()
        theta = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p, x in zip(trained, g, strict=True):
                p += x / (norm + 1e-12)
        second = model(images)
        h = [shannon(row) for row in second]
        s2 = [b for b in (range(len(h)) if official else s1) if h[b] < e0]
        others += len(set(s2) - set(s1))
        g = [torch.zeros_like(p) for p in trained]
        if s2:
            loss = sum(h[b] for b in s2) / len(s2)
            g = torch.autograd.grad(loss, trained)
            average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        with torch.no_grad():
            for p, x in zip(trained, theta, strict=True):
                p.copy_(x)
        sgd.step(g)
        if average is not None and average < reset_below:
            resets += 1
            with torch.no_grad():
                for p, x in zip(trained, start, strict=True):
                    p.copy_(x)
            sgd = NaiveSGD(trained, 0.02, 0.9)
        expected = second if official else first
        torch.testing.assert_close(adapter(images), expected.detach(), **CLOSE)
        assert adapter.memory["average"] == pytest.approx(average, abs=1e-10)
    same_weights(adapter, model)
    assert adapter.memory["resets"] == resets
    assert {0.2: resets == 0, 0.67: 0 < resets < 7, 9.0: resets == 7}[reset_below], average
    assert (others > 0) == official
    assert bool(adapter.optimizer.state) == (reset_below == 0.2)  # which resets end, too


def test_sar_s_settings_differ():
    outputs = [
        [adapter(images) for images in stream(4)]
        for adapter in (adapt(vit(), "sar", setting=s, lr=0.02) for s in ("paper", "official"))
    ]
    assert not torch.equal(outputs[0][0], outputs[1][0])  # the logits that are returned
    rates = [adapt(vit(), "sar", setting=s).optimizer.param_groups[0]["lr"]
             for s in ("paper", "official")]  # fmt: skip
    assert rates == [1e-3, 5e-4]


@pytest.mark.parametrize(("setting", "moves"), [("paper", True), ("official", False)])
def test_sar_without_reliable_samples(setting, moves):
    """Upstream takes a step with a gradient of 0, so momentum moves on; MoETTA's code does not."""
    adapter = adapt(vit(), "sar", setting=setting, lr=0.02, reset_below=0.0)
    images = stream(1)[0]
    adapter(images)
    before = adapter.model.blocks[0].norm1.weight.detach().clone()
    object.__setattr__(adapter.config, "margin", RARE)
    adapter(images)
    assert (adapter.model.blocks[0].norm1.weight != before).any() == moves
    assert adapter.steps == 1 + moves and adapter.skipped == 0


def test_sar_takes_no_step_where_the_shifted_weights_are_of_no_use():
    adapter, images = adapt(vit(), "sar", lr=0.02), stream(1)[0]
    adapter(images)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    object.__setattr__(adapter.config, "rho", 1e300)
    assert adapter(images).isfinite().all()  # the logits at the weights themselves
    assert (adapter.steps, adapter.skipped) == (1, 1)
    torch.testing.assert_close(dict(adapter.model.state_dict()), before, rtol=0, atol=0)


def test_sar_leaves_the_last_layers_alone():
    adapter = adapt(vit(depth=12), "sar")
    names = {n for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert names == {
        f"blocks.{b}.norm{i}.{kind}"
        for b in range(9)
        for i in (1, 2)
        for kind in ("weight", "bias")
    }


DEYO = {"paper": (0.5, 0.4, 0.2, 1e-3), "official": (0.4, 0.5, 0.5, 5e-5)}


@pytest.mark.parametrize("setting", list(DEYO))
def test_deyo(setting):
    tau, e0, _, lr = DEYO[setting]
    least, lr = 0.01, 100 * lr  # noise has little shape to lose
    adapter, model = adapt(vit(), "deyo", setting=setting, seed=3, plpd=least, lr=lr), vit()
    trained = affines(model)
    sgd, generator = NaiveSGD(trained, lr, 0.9), torch.Generator().manual_seed(3)
    steps = dropped = 0
    for images in stream(5):
        logits = model(images)
        h = [shannon(row) for row in logits]
        s1 = [b for b in range(len(h)) if h[b] < tau * LN_C]
        noise = torch.rand(len(s1), 16, generator=generator)
        fall = {}
        for b, order in zip(s1, noise.argsort(dim=1).tolist(), strict=True):
            patches = [images[b][:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
                       for r in range(4) for c in range(4)]  # fmt: skip
            mixed = [patches[i] for i in order]
            rows = [torch.cat(mixed[4 * r : 4 * r + 4], dim=2) for r in range(4)]
            other = model(torch.cat(rows, dim=1).unsqueeze(0))[0].softmax(dim=0).detach()
            p = logits[b].softmax(dim=0).detach()
            fall[b] = float(p.max() - other[p.argmax()])
        chosen = [b for b in s1 if fall[b] > least]
        dropped += len(s1) - len(chosen)
        torch.testing.assert_close(adapter(images), logits.detach(), **CLOSE)
        if not chosen:
            continue
        steps += 1
        weights = {
            b: math.exp(e0 * LN_C - float(h[b].detach())) + math.exp(fall[b]) for b in chosen
        }
        loss = sum(weights[b] * h[b] for b in chosen) / len(chosen)
        sgd.step(torch.autograd.grad(loss, trained))
    same_weights(adapter, model)
    assert adapter.steps == steps > 1 and dropped


def test_deyo_s_constants_by_setting():
    from dynmoe.tta.methods.reliable import CONSTANTS

    for setting, (tau, e0, least, lr) in DEYO.items():
        assert CONSTANTS[setting] == {"lr": lr, "filter": tau, "margin": e0, "plpd": least}


@pytest.mark.parametrize("options", [{"filter": RARE}, {"plpd": 2.0}])
def test_deyo_does_nothing_without_trusted_samples(options):
    adapter = adapt(vit(), "deyo", **options)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    assert torch.equal(adapter(stream(1)[0]), vit()(stream(1)[0]))
    assert (adapter.steps, adapter.skipped) == (0, 0)
    torch.testing.assert_close(dict(adapter.model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [("eata", {"margin": RARE, "fisher_weight": 0.0}), ("deyo", {"filter": RARE}),
     ("sar", {"margin": RARE}), ("sar", {"margin": RARE, "setting": "official"})],
)  # fmt: skip
def test_a_spoilt_batch_counts_as_skipped_even_where_nobody_is_trusted(method, options):
    adapter, images = adapt(vit(), method, **options), stream(1)[0]
    images[2, 0, 3, 3] = float("nan")
    adapter(images)
    assert (adapter.steps, adapter.skipped) == (0, 1)


def test_deyo_cannot_cut_more_patches_than_pixels():
    assert adapt(vit(), "deyo", filter=9.0, grid=16)(stream(1)[0]).isfinite().all()
    with pytest.raises(UserError, match="grid=17 .* use 1 to 16"):
        adapt(vit(), "deyo", grid=17)(stream(1)[0])


def test_deyo_does_not_trust_what_loses_nothing():
    """Images of one colour have no shape to destroy: PLPD is 0, and must be above the threshold."""
    adapter = adapt(vit(), "deyo", filter=9.0, plpd=0.0)
    adapter(stream(1)[0][:, :, :1, :1].expand(-1, -1, 16, 16).contiguous())
    assert (adapter.steps, adapter.skipped) == (0, 0)

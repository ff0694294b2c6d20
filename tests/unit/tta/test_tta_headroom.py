"""The gates against restatements in float64, and what they leave behind: nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from tta_models import CLASSES, NaiveSGD, affines, resnet, shannon, stream, vit

from dynmoe.experiments.tta.gates import averaged, gate_value, verdict
from dynmoe.tta import adapt, headroom
from dynmoe.tta.entropy import tent_loss
from dynmoe.tta.headroom import LOSSES, Split, batches_of

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def domains(side: int = 16) -> dict[str, Split]:
    found = {}
    for number, name in enumerate(("dark", "bright", "noisy")):
        images = torch.cat(stream(3, size=5, side=side, seed=number)) * (1 + number) + number
        labels = torch.arange(15).roll(number) % CLASSES
        found[name] = Split((images[:10], labels[:10]), (images[10:], labels[10:]))
    return found


def naive_losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    h = [shannon(row) for row in logits]
    sure = [v for v in h if v < 0.4 * math.log(CLASSES)]
    mean = sum(row.exp() / row.exp().sum() for row in logits) / len(logits)
    pairs = zip(logits, labels.tolist(), strict=True)
    return {
        "true": sum(row.exp().sum().log() - row[y] for row, y in pairs) / len(h),
        "entropy": sum(h) / len(h),
        "reliable": sum(sure) / max(len(sure), 1) + 0 * logits.sum(),
        "information": sum(h) / len(h) + sum(q * q.log() for q in mean),
    }


def naive_gradients(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    model = vit()
    trained, total = affines(model), {}
    for images, labels in batches:
        for name in ("true", *LOSSES):
            loss = naive_losses(model(images), labels)[name]
            row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
            total[name] = total.get(name, 0) + row
    return total


def naive_cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def test_cosines_with_the_true_gradient():
    batches = domains()["bright"].batches(4)
    assert [len(labels) for _, labels in batches] == [4, 3, 3]
    want = naive_gradients(batches)
    got = headroom.teacher_cosines(vit().requires_grad_(False), batches, LOSSES)
    for name in LOSSES:
        assert got[name] == pytest.approx(naive_cosine(want[name], want["true"]), rel=1e-9)
    assert len(set(got.values())) == 3


def test_alignment_of_domains():
    parts = {name: split.batches(5) for name, split in domains().items()}
    rows = [naive_gradients(batches)["entropy"] for batches in parts.values()]
    got = headroom.alignment(vit().requires_grad_(False), parts)
    want = [[naive_cosine(a, b) for b in rows] for a in rows]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.double), **CLOSE)
    pairs = (want[0][1] + want[0][2] + want[1][2]) / 3
    assert headroom.mean_pairwise(got) == pytest.approx(pairs)


def test_alignment_during_adaptation_is_that_of_what_is_trained():
    adapter = adapt(vit(), "moetta", num_experts=2, lr=0.1)
    for images in stream(2):
        adapter(images)
    before = copy.deepcopy(adapter.state_dict())
    trained = [p for p in adapter.parameters() if p.requires_grad]
    parts = {name: split.batches(5) for name, split in domains().items()}
    cosines = headroom.alignment(adapter.model, parts, parameters=trained)
    assert cosines.isfinite().all() and headroom.mean_pairwise(cosines) < 1
    torch.testing.assert_close(adapter.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in trained)


def naive_tent(batches: list[Tensor], lr: float) -> nn.Module:
    model = vit()
    trained = affines(model)
    sgd = NaiveSGD(trained, lr, 0.9)
    for images in batches:
        logits = model(images)
        loss = sum(shannon(row) for row in logits) / len(logits)
        sgd.step(torch.autograd.grad(loss, trained))
    return model


def naive_scores(models: dict[str, nn.Module]) -> dict[str, float]:
    parts = {name: split.held for name, split in domains().items()}
    return {n: float((models[n](x).argmax(1) == y).double().mean()) for n, (x, y) in parts.items()}


def test_perfect_routing_and_shared_weights_on_the_same_order(monkeypatch):
    monkeypatch.setattr(headroom, "RATES", (1.0, 30.0))
    found = headroom.measure(
        vit(), domains(), lambda model, rate: adapt(model, "tent", lr=0.01 * rate), tent_loss, 4,
        torch.Generator().manual_seed(0), passes=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    torch.randperm(30, generator=generator)  # the supervised weights' order
    order = torch.randperm(30, generator=generator)
    everything = torch.cat([split.learnt[0] for split in domains().values()])[order]
    shared, routed = [], []
    for rate in headroom.RATES:
        one = naive_tent(list(everything.tensor_split(8)), 0.01 * rate)
        shared.append(naive_scores(dict.fromkeys(domains(), one)))
        own = {
            name: naive_tent(list(everything[order // 10 == number].tensor_split(3)), 0.01 * rate)
            for number, name in enumerate(domains())
        }
        routed.append(naive_scores(own))
    for column, trials in (("shared", shared), ("routed", routed)):
        want = max(trials, key=lambda scores: sum(scores.values()))
        assert {n: row[column] for n, row in found["domains"].items()} == want
    source = naive_scores(dict.fromkeys(domains(), vit()))
    assert {n: row["source"] for n, row in found["domains"].items()} == source
    assert len({tuple(t.values()) for t in (*shared, *routed)}) > 1  # the rates matter
    gain = sum(r["routed"] - r["shared"] for r in found["domains"].values()) / 3
    assert headroom.routing_gain(found) == pytest.approx(gain)


def test_supervised_weights_take_equal_steps_of_adam():
    batches = domains()["dark"].batches(5)
    got = headroom.supervised(vit(), batches, 3, 0.01)
    model = vit()
    trained = affines(model)
    first, second = [0] * len(trained), [0] * len(trained)
    for step, (images, labels) in enumerate([*batches, batches[0]], start=1):
        loss = naive_losses(model(images), labels)["true"]
        for i, g in enumerate(torch.autograd.grad(loss, trained)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            size = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
            with torch.no_grad():
                trained[i] -= 0.01 * first[i] / (1 - 0.9**step) / size
    for mine, theirs in zip(got.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), **CLOSE)


def test_labels_help_where_each_domain_names_things_its_own_way():
    """Two domains with the same images and opposite labels: shared weights cannot serve both."""
    images = torch.cat(stream(4, size=8, seed=3))
    labels = torch.arange(32) % 2
    parts = {"a": labels, "b": 1 - labels}
    found = headroom.own_and_shared(
        {name: Split((images, y), (images, y)) for name, y in parts.items()}, 16,
        torch.Generator().manual_seed(0),
        own=lambda batches, rate: headroom.supervised(vit(), batches, 30, rate),
        shared=lambda batches, rate: headroom.supervised(vit(), batches, 30, rate),
        rates=(0.03,),
    )  # fmt: skip
    assert min(found["own"].values()) > 0.7 > 0.6 > sum(found["shared"].values()) / 2


@pytest.mark.parametrize("kind", [vit, resnet])
def test_the_source_model_stays_as_it_was(kind):
    model = kind()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    found = headroom.measure(
        model, domains(32 if kind is resnet else 16),
        lambda one, rate: adapt(one, "tent", lr=0.05 * rate, im=1.0),
        LOSSES["information"], 5, torch.Generator().manual_seed(0), passes=1,
    )  # fmt: skip
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn) and not model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    row = found["domains"]["dark"]
    assert row["cosine_own"] == row["cosine_information"] and math.isfinite(found["alignment"])


def gates(own: float, routed: float) -> dict:
    row = {f"cosine_{key}": 0.1 for key in LOSSES} | {"cosine_own": own, "routed": routed}
    row |= {"shared": 0.5, "source": 0.5, "supervised": 0.7, "supervised_shared": 0.6}
    return {"domains": {"a": row, "b": row | {"cosine_own": 0.1}}, "alignment": 0.4,
            "along": [[3, own]]}  # fmt: skip


def test_a_stream_is_judged_by_both_gates():
    assert verdict(gates(0.2, 0.54)).endswith("this stream can tell whether experts help.")
    for failed in (gates(-0.2, 0.54), gates(0.2, 0.52)):
        assert verdict(failed).endswith("unable to tell here whether experts help.")
    assert "gate 1 failed" in verdict(gates(-0.2, 0.54)) and "1 of 2" in verdict(gates(-0.2, 0.5))
    assert "gate 2 failed" in verdict(gates(0.2, 0.52)) and "+2.0 points" in verdict(gates(1, 0.52))
    both = averaged([gates(-0.2, 0.5), gates(0.4, 0.6)])
    assert both["domains"]["a"]["cosine_own"] == pytest.approx(0.1)
    assert both["along"] == [[3, pytest.approx(0.1)]]
    assert gate_value(both, "gate_gain") == pytest.approx(0.05)
    assert gate_value(both, "gate_headroom") == pytest.approx(0.1)
    unknown = gates(0.4, 0.5) | {"alignment": None, "along": [[3, None]]}  # as a file has nan
    assert averaged([unknown, gates(0.4, 0.5)])["alignment"] == pytest.approx(0.4)
    assert math.isnan(gate_value(unknown, "gate_alignment"))
    assert gate_value(both, "gate_positive") == 1 and math.isnan(gate_value({}, "gate_gain"))


def test_batches_are_as_even_as_can_be():
    sizes = [len(y) for _, y in batches_of(torch.zeros(11, 1), torch.zeros(11), 4)]
    assert sizes == [4, 4, 3]

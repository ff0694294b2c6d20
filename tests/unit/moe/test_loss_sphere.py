"""The SPHERE loss against loops, and what it does to the spectrum of the features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bank_cases import make_layer as make_layer_of
from bank_cases import samples as samples_of
from loss_tools import close, given_by, loss_of, make_layer, make_loss, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import LossInput, MoELayer, collect_aux_losses
from dynmoe.moe.losses.diversity import SphereLoss

FORMS = ("relative", "paper")


def value(features: list[list[float]], form: str) -> float:
    """The loss of features, one row per sample, entry by entry."""
    width = len(features[0])
    gram = [
        [math.fsum(row[i] * row[j] for row in features) / len(features) for j in range(width)]
        for i in range(width)
    ]
    c = math.fsum(gram[i][i] for i in range(width)) / width
    gaps = [(gram[i][j] - c * (i == j)) ** 2 for i in range(width) for j in range(width)]
    return math.fsum(gaps) if form == "paper" else math.fsum(gaps) / c**2 / width


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", [1, 3, 5])
@pytest.mark.parametrize("router", ["cosine", "topk", "relu"])
def test_of_units_is_the_gap_of_the_weighted_gram(router, experts, form):
    layer, x = make_layer(router, experts), samples()
    layer.bank.segment.copy_(layer.bank.segment[torch.randperm(12)])
    gates, rows = layer.router(x).gates.tolist(), []
    owner, w, b = (t.tolist() for t in (layer.bank.segment, layer.bank.w_in, layer.bank.b_in))
    for n, sample in enumerate(x.tolist()):
        hidden = [
            math.tanh(math.fsum(a * v for a, v in zip(w[h], sample, strict=True)) + b[h])
            for h in range(12)
        ]
        rows.append([gates[n][owner[h]] * hidden[h] for h in range(12)])
    close(loss_of("sphere", layer, x, form=form), value(rows, form))


@pytest.mark.parametrize("form", FORMS)
def test_of_images_every_position_is_a_sample(form):
    layer, x = make_layer_of("conv"), samples_of("conv")
    routing, hidden, rows = layer.router(x.mean(dim=(2, 3))), layer.bank.hidden(x), []
    for n in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                gates = routing.gates[n, layer.bank.segment]
                rows.append((hidden[n, :, i, j] * gates).tolist())
    inputs = LossInput(x, routing, layer.router, layer.bank)
    close(make_loss("sphere", 6, form=form)(inputs), value(rows, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("router", ["cosine", "topk"])
def test_of_networks_the_last_hidden_layer_counts(router, layers, form):
    layer, x, rows = make_layer_of("networks", router, {"layers": layers}), samples(6), []
    x = torch.cat([x, x[:, :1]], dim=1)
    bank, gates = layer.bank, layer.router(x).gates
    for n in range(len(x)):
        row: list[float] = []
        for e in range(3):
            h = x[n]
            for weight, bias in list(zip(bank.weights, bank.biases, strict=True))[:-1]:
                h = torch.tanh(weight[e] @ h + bias[e])
            row += (gates[n, e] * h).tolist()
        rows.append(row)
    loss = make_loss("sphere", 6, form=form)(given_by(layer, x))
    close(loss, value(rows, form))
    loss.backward()
    assert bank.weights[-1].grad is None and not bank.weights[0].grad[3:].any()
    assert bank.weights[0].grad[:3].any()


def spectrum(features: Tensor) -> np.ndarray:
    return np.linalg.eigvalsh(features.T.numpy() @ features.numpy() / len(features))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_relative_is_the_squared_variation_of_the_eigenvalues(scale):
    """Scaling every gate scales the paper's form by the fourth power, and the other not."""
    layer, x = make_layer(experts=3), samples(30)
    inputs = given_by(layer, x)
    inputs.routing.gates = inputs.routing.gates * scale
    features = layer.bank.hidden(x) * inputs.routing.gates[:, layer.bank.segment]
    eigenvalues = spectrum(features.detach())
    variation = eigenvalues.var() / eigenvalues.mean() ** 2
    torch.testing.assert_close(make_loss("sphere")(inputs).item(), variation, rtol=1e-9, atol=0)
    paper = make_loss("sphere", form="paper")(inputs).item()
    assert paper == pytest.approx(12 * eigenvalues.var(), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_0_for_orthogonal_features_and_the_most_for_equal_ones(form):
    layer = make_layer(experts=1)
    with torch.no_grad():
        layer.bank.w_in.zero_()
        layer.bank.b_in.fill_(2.0)
    equal = loss_of("sphere", layer, samples(), form=form)
    close(equal, 11.0 if form == "relative" else 12 * 11 * math.tanh(2.0) ** 4)
    orthogonal = torch.linalg.qr(torch.randn(12, 12, dtype=torch.double)).Q
    layer.bank.hidden = lambda x: orthogonal
    close(loss_of("sphere", layer, samples(12), form=form), 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_dead_features_give_0_and_no_nan(form):
    layer = make_layer().float()
    with torch.no_grad():
        layer.bank.w_in.zero_()
        layer.bank.b_in.zero_()
    loss = loss_of("sphere", layer, samples().float(), form=form)
    loss.backward()
    assert loss.item() == 0.0 and layer.bank.w_in.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_two_experts_with_the_same_features_are_worse_than_two_different_ones(form):
    """One penalty for all experts: no sum over experts would see the difference."""
    layer, x = make_layer(experts=2), samples(40)
    layer.bank.set_hidden_sizes([6, 6])
    with torch.no_grad():
        for parameter in (layer.bank.w_in, layer.bank.b_in):
            parameter[6:] = -parameter[:6]  # tanh is odd: same spectrum, opposite features
        layer.router.weight.zero_()
    same = loss_of("sphere", layer, x, form=form)
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.double)).Q
        layer.bank.w_in[6:] = layer.bank.w_in[:6] @ turn
    assert loss_of("sphere", layer, x, form=form) < 0.9 * same


@pytest.mark.parametrize("router", ["cosine", "topk"])
def test_descent_brings_the_eigenvalues_together(router):
    layer, x = make_layer(router), samples(200)

    def ratio() -> float:
        gates = layer.router(x).gates[:, layer.bank.segment]
        found = spectrum((layer.bank.hidden(x) * gates).detach())
        return found.max() / found.mean()

    before, optimizer = ratio(), torch.optim.Adam(layer.bank.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss_of("sphere", layer, x).backward()
        optimizer.step()
    assert ratio() < 0.7 * before


def test_a_layer_adds_it_with_its_weight():
    config = SphereLoss.Config(weight=0.5, form="paper")
    layer = MoELayer(4, 3, 12, num_experts=3, losses=(config,)).double()
    x = samples()
    layer(x)
    expected = 0.5 * make_loss("sphere", form="paper")(given_by(layer, x))
    close(collect_aux_losses(layer)[".sphere"], expected.detach())


def test_experts_without_hidden_layer_are_refused_in_one_line():
    layer, x = make_layer_of("affine"), samples_of("affine")
    inputs = LossInput(x, layer.router(x.mean(dim=1)), layer.router, layer.bank)
    message = "sphere loss: experts of bank 'affine' have no hidden layer"
    with pytest.raises(UserError, match=message) as error:
        make_loss("sphere", 6)(inputs)
    assert "\n" not in str(error.value)


def test_another_form_is_refused():
    with pytest.raises(UserError, match="form='l2' must be relative or paper"):
        make_loss("sphere", form="l2")


@pytest.mark.parametrize("form", FORMS)
def test_padding_does_not_count_as_samples(form):
    layer, x = make_layer("topk"), samples(7)
    mask = torch.arange(10) < 7
    padded = torch.cat([x, torch.full((3, 4), 9.0).double()])
    expected = loss_of("sphere", layer, x, form=form)
    close(loss_of("sphere", layer, padded, mask, form=form), expected.detach())

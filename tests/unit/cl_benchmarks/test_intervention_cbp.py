"""Continual backpropagation against its algorithm written out in loops."""

from __future__ import annotations

import pytest
import torch
from intervention_helpers import NETWORKS, Loop, batch
from torch import Tensor, nn

from dynmoe.growth import Budget
from dynmoe.interventions.resetting import CBP


def outgoing(model: nn.Module, number: int) -> list[list[float]]:
    """Weights that read each unit of a hidden layer of the MLP."""
    return model[(3, 5)[number]].weight.detach().T.tolist()  # type: ignore[index]


@pytest.mark.parametrize("compensate", [True, False])
def test_utility_age_and_choice_are_the_algorithms(compensate: bool) -> None:
    rate, maturity, decay = 0.07, 3, 0.9
    loop = Loop("mlp", "cbp", tasks=False, rate=rate, maturity=maturity, decay=decay,
                compensate_bias=compensate)  # fmt: skip
    intervention = loop.intervention
    assert isinstance(intervention, CBP)
    age = [[0] * 12, [0] * 8]
    mean, utility = [[0.0] * 12, [0.0] * 8], [[0.0] * 12, [0.0] * 8]
    due, replaced = [0.0, 0.0], 0
    chosen: list[tuple[int, list[int]]] = []
    update = intervention.update

    def noted(layer, record, m, s):  # type: ignore[no-untyped-def]
        number = intervention.layers.index(layer)
        nonlocal replaced
        expected: list[int] = []
        w = outgoing(loop.model, number)
        for i in range(len(age[number])):
            age[number][i] += 1
            mean[number][i] = decay * mean[number][i] + (1 - decay) * float(m[i])
            now = float(s[i]) * sum(abs(x) for x in w[i])
            utility[number][i] = decay * utility[number][i] + (1 - decay) * now
        mature = [i for i, a in enumerate(age[number]) if a > maturity]
        due[number] += rate * len(mature)
        while due[number] >= 1:
            left = [i for i in mature if i not in expected]
            expected.append(
                min(left, key=lambda i: utility[number][i] / (1 - decay ** age[number][i]))
            )
            due[number] -= 1
        index = update(layer, record, m, s)
        assert index.tolist() == expected
        for i in expected:
            age[number][i], mean[number][i], utility[number][i] = 0, 0.0, 0.0
        assert record.age.tolist() == age[number]
        assert record.mean.tolist() == pytest.approx(mean[number], abs=1e-5)
        assert record.utility.tolist() == pytest.approx(utility[number], abs=1e-5)
        assert record.due == pytest.approx(due[number], abs=1e-9)
        replaced += len(expected)
        chosen.append((number, expected))
        return index

    intervention.update = noted  # type: ignore[method-assign]
    loop.run(20)
    assert replaced > 8 and {n for n, c in chosen if c} == {0, 1}


def test_batch_means_are_those_of_the_activations() -> None:
    loop = Loop("mlp", "cbp")
    torch.manual_seed(0)
    hidden = NETWORKS["mlp"]()[:3](batch(0)[0])  # type: ignore[index]
    seen: list[tuple[Tensor, Tensor]] = []
    loop.intervention.update = lambda layer, record, m, s: seen.append((m, s))  # type: ignore[attr-defined]
    loop.run(1)
    assert torch.allclose(seen[0][0], hidden.mean(0)) and torch.allclose(seen[0][1], hidden.mean(0))


@pytest.mark.parametrize("network", ["mlp", "moe", "conv"])
def test_bias_takes_over_the_mean_activation(network: str) -> None:
    """Where units act alike on all samples, a replaced one is not missed at all."""
    loop = Loop(network, "cbp")
    intervention, model = loop.intervention, loop.model.double()
    assert isinstance(intervention, CBP)
    for number, layer in enumerate(intervention.layers):
        if layer.norms or (network == "moe" and number == 0):
            continue  # the router sees the units as well
        index = torch.tensor([1, 2])
        with torch.no_grad():
            for slot in layer.incoming:
                slot.parameter[index] = 0.0 if slot.parameter.dim() > 1 else 0.7
        record = intervention.records[number]
        record.age[index], record.mean = 5.0, record.mean.double()
        record.mean[index] = 0.7 * (1 - 0.99**5)
        images = batch(3)[0].double()
        with torch.no_grad():
            before = model.eval()(images)
            intervention.replace(layer, record, index)
            after = model(images)
            assert torch.allclose(before, after, atol=1e-6), layer.name
            assert record.age[index].sum() == 0 and not record.mean[index].any()
            assert all(not s.unit_major(s.parameter)[1:3].any() for s in layer.outgoing)


def test_without_compensation_the_biases_stay() -> None:
    loop = Loop("mlp", "cbp", compensate_bias=False)
    intervention, bias = loop.intervention, loop.model[3].bias  # type: ignore[index]
    assert isinstance(intervention, CBP)
    before = bias.detach().clone()
    intervention.records[0].mean.fill_(1.0)
    intervention.records[0].age.fill_(9.0)
    with torch.no_grad():
        intervention.replace(intervention.layers[0], intervention.records[0], torch.tensor([0]))
    assert torch.equal(before, bias)


def test_young_units_are_spared_and_none_is_replaced_at_rate_0() -> None:
    for options in ({"maturity": 50, "rate": 1.0}, {"maturity": 0, "rate": 0.0}):
        loop = Loop("mlp", "cbp", tasks=False, **options).run(20)
        plain = Loop("mlp", "none", tasks=False).run(20)
        pairs = zip(loop.model.parameters(), plain.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rate_1_replaces_every_mature_unit_at_once() -> None:
    loop = Loop("mlp", "cbp", tasks=False, rate=1.0, maturity=4).run(5)
    assert all(not record.age.any() for record in loop.intervention.records)  # type: ignore[attr-defined]


def test_units_of_a_growth_start_young() -> None:
    for budget in (Budget(), Budget(mode="per-growth")):
        loop = Loop("moe", "cbp", budget=budget).run(3)
        before = loop.intervention.records[1].mean.clone()  # type: ignore[attr-defined]
        bank = loop.model[3].bank  # type: ignore[index]
        old = bank.w_in.detach().clone()
        loop.controller.grow(3, batch(0))
        after = loop.intervention.records[1]  # type: ignore[attr-defined]
        new = torch.ones(len(bank.w_in), dtype=torch.bool)
        new[: len(old)] = (bank.w_in[: len(old)] != old).any(dim=1)
        assert 0 < int(new.sum()) < len(new)
        assert after.age.tolist() == [0.0 if n else 3.0 for n in new]
        assert torch.equal(after.mean[~new], before[~new[: len(before)]])
        assert not after.mean[new].any() and not after.utility[new].any()
    loop.run(4)
    assert after.age.max() >= 1

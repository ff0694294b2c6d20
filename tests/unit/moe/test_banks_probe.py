"""The plasticity probe and its metrics over a network with any bank in it."""

from __future__ import annotations

import pytest
import torch
from bank_cases import BANKS, EXPERTS, HIDDEN, WITH_UNITS, active_rows, make_layer, samples
from torch import nn

from dynmoe.growth import GrowthController
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.probes import take_probe


@pytest.mark.parametrize("router", ["cosine", "topk"])
@pytest.mark.parametrize("name", BANKS)
def test_a_probe_reads_every_bank(name, router):
    layer, x = make_layer(name, router, shared_hidden=2), samples(name, 10)
    width = layer(x)[0].numel()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 3).double())
    labels = torch.arange(10) % 3
    for experts in (EXPERTS, EXPERTS + 1):
        probe = take_probe(model, x, labels)
        for key in active_rows(layer):  # the rows reserved for experts to come are left out
            assert len(probe.parameters[f"0.{key}"]) == experts, key
            assert len(probe.gradients[f"0.{key}"]) == experts, key
        if name in WITH_UNITS and name != "conv":  # conv has an activation per pixel
            (found,) = probe.experts.values()
            assert found.hidden.shape == (10, HIDDEN) and found.gates.shape == (10, experts)
            torch.testing.assert_close(found.hidden, layer.bank.hidden(x).detach())
            assert found.weight_out.shape == found.weight_out_grad.shape == (4, HIDDEN)
            assert found.weight_in.shape == found.weight_in_grad.shape == (HIDDEN, 5)
        elif name == "bottleneck":
            (found,) = probe.experts.values()
            torch.testing.assert_close(found.hidden, layer.bank.hidden(x).detach())
            assert len(found.segment) == found.hidden.shape[1] and found.weight_in is None
            assert found.weight_out.shape == found.weight_out_grad.shape == (4, len(found.segment))
            assert found.weight_out_grad.any(dim=0).all()
        else:
            assert probe.experts == {}
        assert len(measure_all(probe)) > 5
        GrowthController(model).grow(1, (x, labels))

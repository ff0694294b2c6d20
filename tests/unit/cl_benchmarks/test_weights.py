"""Weight matrices, output layers, and new first values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from intervention_helpers import NETWORKS, conv, mlp, moe, seeded, weights
from torch import nn

from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.pruning import RandomUnits
from dynmoe.interventions.weights import (
    fresh_draw,
    linear_outputs,
    output_layers,
    replace_module,
    swap_parameter,
    weight_matrices,
)
from dynmoe.moe import MoELayer
from dynmoe.moe.hyper import HyperMoE
from dynmoe.moe.upcycle import adapt_linears


def names_of(model: nn.Module, outputs: bool = True) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(slot.parameter)] for slot in weight_matrices(model, outputs)}


def test_matrices_are_those_of_layers_and_pools() -> None:
    assert names_of(mlp()) == {"1.weight", "3.weight", "5.weight"}
    assert names_of(conv()) == {"0.weight", "4.weight", "7.weight", "10.weight"}
    pools = {f"3.{bank}.{w}" for bank in ("bank", "shared") for w in ("w_in", "w_out")}
    assert names_of(moe()) == {"1.weight", "4.weight"} | pools
    assert names_of(moe()) - names_of(moe(), outputs=False) == {"4.weight"}


class TwoHeads(nn.Module):
    """Names its output layers; one is an MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.mixed, self.last = nn.Linear(4, 2), MoELayer(4, 2, 6), nn.Linear(4, 4)

    def output_layers(self) -> list[nn.Module]:
        return [self.head, self.mixed]


def test_output_layers_may_be_named() -> None:
    model = TwoHeads()
    assert output_layers(model) == [model.head, model.mixed]
    assert names_of(model, outputs=False) == {"mixed.bank.w_in", "last.weight"}
    with pytest.raises(UserError, match="intervention x needs linear output layers.*MoELayer"):
        linear_outputs(model, "x")
    plain = mlp()
    assert linear_outputs(plain, "x") == [plain[5]]  # type: ignore[index]


@pytest.mark.parametrize("network", NETWORKS)
def test_fresh_values_are_new_and_of_the_same_kind(network: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    model.train()
    before, buffers = weights(model), {n: b.clone() for n, b in model.named_buffers()}
    drawn, again, other = (fresh_draw(model, seeded(s)) for s in (1, 1, 2))
    assert drawn.keys() == before.keys()
    for name, value in drawn.items():
        assert value.shape == before[name].shape and not value.requires_grad
        assert torch.equal(value, again[name])
        if value.std() > 0:  # not those of normalisation
            assert not torch.equal(value, other[name]) and not torch.equal(value, before[name])
            ratio = float(value.abs().max() / before[name].abs().max())
            assert 0.3 < ratio < 3 or value.numel() < 8
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_fresh_values_leave_torchs_generator_alone_and_the_rest_out() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    model, state = Scaled(), torch.get_rng_state()
    assert fresh_draw(model, seeded()).keys() == {"linear.weight", "linear.bias"}
    assert torch.equal(torch.get_rng_state(), state)


def test_fresh_values_of_a_layer_that_grew_are_those_of_its_present_size() -> None:
    """Its own reset would go back to the experts that it started with."""
    torch.manual_seed(0)
    layer = MoELayer(4, 3, 12, num_experts=2, max_experts=4)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    pruning, budget = RandomUnits.Config(), Budget(mode="per-growth")
    GrowthController(model, budget=budget, pruning=pruning).grow(0)
    drawn = fresh_draw(model, seeded())
    assert drawn.keys() == weights(model).keys()
    assert drawn["1.bank.w_in"].shape == (18, 4) and layer.num_experts == 3
    torch.manual_seed(int(torch.randint(2**62, (), generator=seeded())))
    model[0].reset_parameters()  # type: ignore[operator]
    assert torch.equal(drawn["0.weight"], model[0].weight)  # type: ignore[arg-type]


def test_swapped_parameters_are_trained_in_their_place() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    old, new = model[5].weight, nn.Parameter(torch.zeros(3, 8))  # type: ignore[index]
    old.grad = torch.ones_like(old)
    optimizer.step()
    place = [id(p) for p in optimizer.param_groups[0]["params"]].index(id(old))
    swap_parameter(optimizer, old, new)
    assert optimizer.param_groups[0]["params"][place] is new and old not in optimizer.state


def test_modules_are_replaced_wherever_they_stand() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(1, 1), shared))
    replace_module(model, shared, nn.Tanh())
    assert isinstance(model[0], nn.Tanh) and model[1][1] is model[0]


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    adapt_linears(model, ["0"], lambda i, o: MoELayer(i, o, 4, max_experts=4, bank="lora"))
    return model


def hyper() -> nn.Module:
    def layer(i: int, o: int) -> MoELayer:
        return MoELayer(i, o, 8, max_experts=4, router="topk", router_options={"k": 1})

    return nn.Sequential(HyperMoE(8, 8, layer), nn.Linear(8, 2))


@pytest.mark.parametrize("network", [adapted, hyper])
def test_fresh_values_of_what_stands_around_a_layer_that_grew(
    network: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = network()
    first, new = weights(model), fresh_draw(model, seeded())
    pruning, budget = RandomUnits.Config(), Budget(mode="per-growth")
    GrowthController(model, budget=budget, pruning=pruning).grow(0)
    drawn = fresh_draw(model, seeded())
    assert drawn.keys() == new.keys() == first.keys()
    for name, value in weights(model).items():
        assert drawn[name].shape == value.shape
        if name.startswith("0.") and ".layer." not in name and first[name].any():
            assert not torch.equal(drawn[name], first[name]), name


def test_attention_is_drawn_as_torch_draws_it_and_nothing_else_changes() -> None:
    """Its input weights are no layer of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))
    before = weights(model)
    drawn = fresh_draw(model, seeded())
    assert drawn.keys() == before.keys()
    inputs, bound = drawn["0.self_attn.in_proj_weight"], (6 / (8 + 24)) ** 0.5
    assert 0.9 * bound < inputs.abs().max() <= bound
    assert not torch.equal(inputs, before["0.self_attn.in_proj_weight"])
    for name in ("in_proj_bias", "out_proj.bias"):  # torch sets the latter to 0, too
        assert not drawn[f"0.self_attn.{name}"].any()
    torch.manual_seed(int(torch.randint(2**62, (), generator=seeded())))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    assert torch.equal(drawn["1.weight"], model[1].weight)  # type: ignore[arg-type]

"""The MoE layer against the definition, a loop over experts, in float64."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, collect_aux_losses
from dynmoe.moe.losses.balance import SwitchLoss

ROUTERS = ("cosine", "softmax", "topk")  # dense and sparse


def make_layer(router: str = "cosine", sizes: tuple[int, ...] = (3, 2, 4), **options) -> MoELayer:
    """A float64 layer 5 -> 4 with room for three more experts than it has."""
    options = {"max_experts": len(sizes) + 3, "activation": "tanh"} | options
    config = registry.get("router", router).Config()
    layer = MoELayer(5, 4, sum(sizes), num_experts=len(sizes), router=config, **options)
    layer.bank.set_hidden_sizes(list(sizes))
    return layer.double()


def loop_over_experts(layer: MoELayer, x: Tensor) -> Tensor:
    """The definition: each expert is an MLP of its own; their outputs are added up by gate."""
    flat = x.reshape(-1, x.shape[-1])
    gates, bank = layer.router(flat).gates, layer.bank
    if layer.gate_scale == "experts":
        gates = gates * (gates > 0).sum(dim=1, keepdim=True)
    y = torch.zeros(len(flat), bank.w_out.shape[0], dtype=x.dtype, device=x.device)
    for expert in range(layer.num_experts):
        units = bank.segment == expert
        hidden = bank.act(flat @ bank.w_in[units].T + bank.b_in[units])
        output = hidden @ bank.w_out[:, units].T + bank.b_out[expert]
        y = y + gates[:, expert : expert + 1] * output
    return y.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("scattered", [False, True], ids=["runs", "scattered"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)], ids=["samples", "tokens"])
@pytest.mark.parametrize("sizes", [(6,), (1, 7), (4, 1, 5, 2)], ids=str)
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_and_gradients_equal_the_loop_over_experts(
    router, gate_scale, sizes, shape, scattered, device
):
    layer = make_layer(router, sizes, gate_scale=gate_scale).to(device)
    if scattered:  # as growth leaves it
        layer.bank.segment.copy_(layer.bank.segment[torch.randperm(sum(sizes))])
    x = torch.randn(shape, dtype=torch.double, device=device, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 4, dtype=torch.double, device=device)
    inputs = {"x": x, **dict(layer.named_parameters())}
    assert inputs.keys() == {
        "x", "router.weight", "bank.w_in", "bank.b_in", "bank.w_out", "bank.b_out"
    }  # fmt: skip
    results = []
    for function in (layer, lambda x: loop_over_experts(layer, x)):
        y = function(x)
        results.append((y, torch.autograd.grad(y, list(inputs.values()), upstream)))
    (y, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name, got, want in zip(inputs, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)
        if name != "router.weight" or len(sizes) > 1:
            assert want.abs().max() > 1e-3, name


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_every_activation_is_the_one_asked_for(activation):
    layer = make_layer(activation=activation)
    x = torch.randn(6, 5, dtype=torch.double)
    function = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}[activation]
    hidden = function(F.linear(x, layer.bank.w_in, layer.bank.b_in))
    torch.testing.assert_close(layer.bank.hidden(x), hidden)


@pytest.mark.parametrize("router", ROUTERS)  # dense and sorted paths
def test_gradcheck(router):
    layer = make_layer(router)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert_is_a_dense_mlp(router, gate_scale):
    layer = make_layer(router, (9,), gate_scale=gate_scale)
    first, second = nn.Linear(5, 9).double(), nn.Linear(9, 4).double()
    with torch.no_grad():
        first.weight.copy_(layer.bank.w_in)
        first.bias.copy_(layer.bank.b_in)
        second.weight.copy_(layer.bank.w_out)
        second.bias.copy_(layer.bank.b_out[0])
    x = torch.randn(6, 5, dtype=torch.double)
    expected = second(torch.tanh(first(x)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 6), batch=st.integers(1, 4))
def test_permuting_samples_or_tokens_permutes_the_output(router, data, tokens, batch):
    layer = make_layer(router)
    x = torch.randn(batch, tokens, 5, dtype=torch.double)
    y = layer(x)
    samples = data.draw(st.permutations(range(batch)))
    order = data.draw(st.permutations(range(tokens)))
    torch.testing.assert_close(layer(x[samples][:, order]), y[samples][:, order])
    torch.testing.assert_close(layer(x.reshape(-1, 5)), y.reshape(-1, 4))


@pytest.mark.parametrize("router", ROUTERS)
def test_unborn_experts_have_no_influence_and_no_gradient(router, device):
    layer = make_layer(router).to(device)
    x = torch.randn(20, 5, dtype=torch.double, device=device)
    before = layer(x)
    with torch.no_grad():
        layer.router.weight[3:] = 1e30
        layer.bank.b_out[3:] = 1e30
    after = layer(x)
    assert torch.equal(before, after)
    after.square().sum().backward()
    for rows in (layer.router.weight, layer.bank.b_out):
        assert not rows.grad[3:].any()
        assert rows.grad[:3].any(dim=1).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_the_generator_alone_decides_the_weights(router):
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.initial_seed() + 1)
        return make_layer(router, generator=torch.Generator().manual_seed(seed)).state_dict()

    first, again, other = state(1), state(1), state(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for name in ("router.weight", "bank.w_in", "bank.b_in", "bank.w_out", "bank.b_out"):
        assert not torch.equal(first[name], other[name]), name


@pytest.mark.parametrize(("init", "fan_in"), [("pool", 400), ("expert", 100)])
def test_weights_fill_the_range_of_torchs_linear_layers(init, fan_in):
    bank = registry.get("bank", "pool").Config(output_init=init)
    layer = MoELayer(25, 30, 400, num_experts=4, bank=bank)
    for weight, bound in (
        (layer.router.weight, 25**-0.5),
        (layer.bank.w_in, 25**-0.5),
        (layer.bank.b_in, 25**-0.5),
        (layer.bank.w_out, fan_in**-0.5),
        (layer.bank.b_out, 400**-0.5),
    ):
        assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("router", ROUTERS)
def test_state_dict_restores_function_and_growth(router):
    layer, other = make_layer(router), make_layer(router, (9,), max_experts=6)
    layer.created[1:3] = torch.tensor([1, 2])
    layer.router.logit_shift[:3] = torch.tensor([0.3, -0.5, 0.1])
    x = torch.randn(6, 5, dtype=torch.double)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), layer(x))
    assert other.num_experts == 3 and other.bank.hidden_sizes() == [3, 2, 4]
    assert other.created.tolist() == [0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize("router", ROUTERS)
def test_state_dict_of_an_earlier_version_loads(router):
    layer, other = make_layer(router), make_layer(router, (9,), max_experts=6)
    layer.created[2] = 1
    state = layer.state_dict()
    state["birth"] = state.pop("created")
    state["router.alive"] = state.pop("router.active")
    other.load_state_dict(state, strict=True)
    x = torch.randn(6, 5, dtype=torch.double)
    assert torch.equal(other(x), layer(x)) and other.num_experts == 3
    assert other.created.tolist() == [0, 0, 1, 0, 0, 0]
    assert {"birth", "router.alive"} <= state.keys()  # the caller's state is left as it was


@pytest.mark.parametrize("router", ROUTERS)
def test_deepcopy_after_a_forward_with_gradients(router):
    layer = make_layer(router, losses=(SwitchLoss.Config(weight=1.0),))
    x = torch.randn(6, 5, dtype=torch.double)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.last_routing is None and layer.last_routing is not None
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.bank.w_in.zero_()
    assert torch.equal(layer(x), y)
    collect_aux_losses(layer)[".switch"].backward()  # the original's graph is whole
    assert layer.router.weight.grad is not None and twin.router.weight.grad is None


@pytest.mark.parametrize("router", ROUTERS)
def test_the_last_routing_is_of_the_last_batch(router):
    layer = make_layer(router)
    assert layer.last_routing is None
    for batch in (4, 7):
        x = torch.randn(batch, 5, dtype=torch.double)
        layer(x)
        torch.testing.assert_close(layer.last_routing.gates, layer.router(x).gates)
        assert layer.last_routing.gates.requires_grad  # a balancing loss can follow it


@pytest.mark.parametrize(("experts", "hidden"), [(0, 5), (6, 5), (-1, 5)])
def test_experts_without_units_are_refused(experts, hidden):
    with pytest.raises(UserError, match=f"{experts} experts cannot share 5 hidden units"):
        MoELayer(3, 3, hidden, num_experts=experts)


def test_float32_stays_close_to_the_loop_in_float64():
    for router in ROUTERS:
        exact = make_layer(router, (40, 30, 50))
        x = torch.randn(200, 5, dtype=torch.double).float()
        expected = loop_over_experts(exact, x.double())
        result = copy.deepcopy(exact).float()(x)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_a_loss_given_twice_is_refused():
    with pytest.raises(UserError, match="loss switch is given twice"):
        MoELayer(3, 3, 6, losses=(SwitchLoss.Config(), SwitchLoss.Config(weight=1.0)))

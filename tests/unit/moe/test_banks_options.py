"""What is particular to one bank: its options, initial weights and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bank_cases import make_layer, samples
from torch import nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import MoELayer


def plain(name: str, dim_in: int = 25, dim_out: int = 25, hidden: int = 400, **options) -> MoELayer:
    """A layer as it is drawn."""
    bank = registry.get("bank", name).Config(**options)
    return MoELayer(dim_in, dim_out, hidden, num_experts=4, max_experts=6, bank=bank)


def assert_fills(weight: torch.Tensor, bound: float) -> None:
    assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("gate", ["silu", "gelu", "relu"])
def test_gated_experts_are_the_papers_with_and_without_biases(gate):
    act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[gate]
    x = samples("swiglu")
    for bias in (False, True):
        layer = make_layer("swiglu", bank={"gate": gate, "bias": bias}, num_experts=1)
        bank = layer.bank
        zero = torch.zeros((), dtype=torch.double)
        b_gate, b_in, b_out = (
            (bank.b_gate, bank.b_in, bank.b_out[0]) if bias else (zero, zero, zero)
        )
        gated = act(x @ bank.w_gate.T + b_gate) * (x @ bank.w_in.T + b_in)
        torch.testing.assert_close(layer(x), gated @ bank.w_out.T + b_out, rtol=1e-12, atol=1e-12)
        assert len(list(bank.parameters())) == (6 if bias else 3)


@pytest.mark.parametrize("router", ["cosine", "topk"])
def test_gated_experts_with_biases_grow(router):
    layer, x = make_layer("swiglu", router, bank={"bias": True}), samples("swiglu")
    optimizer = torch.optim.Adam(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    config = registry.get("init", "duplicate").Config()
    budget = Budget(mode="per-growth", units=2)
    controller = GrowthController(layer, optimizer, init=config, budget=budget)
    before = layer(x).detach()
    controller.grow(1, (x, None))
    if router == "cosine":
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    outputs = layer.bank.expert_outputs(x)
    routing = layer.router(x)
    scale = routing.used() if router == "cosine" else routing.used().double()
    mixed = torch.einsum("nm,mno->no", routing.gates * scale, outputs)
    torch.testing.assert_close(layer(x), mixed, rtol=1e-12, atol=1e-12)


def test_gated_experts_have_one_activation_of_their_own():
    x, bank = samples("swiglu"), registry.get("bank", "swiglu").Config()
    one, other = (MoELayer(5, 4, 6, bank=bank, activation=a).double() for a in ("relu", "tanh"))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_initial_weights_fill_their_ranges():
    swiglu = plain("swiglu", bias=True).bank
    for weight in (swiglu.w_gate, swiglu.w_in, swiglu.b_gate, swiglu.b_in):
        assert_fills(weight, 25**-0.5)
    for weight in (swiglu.w_out, swiglu.b_out):
        assert_fills(weight, 400**-0.5)
    conv = plain("conv").bank
    for weight in (conv.w_in, conv.b_in):
        assert_fills(weight, (25 * 9) ** -0.5)
    for weight in (conv.w_out, conv.b_out):
        assert_fills(weight, 400**-0.5)
    networks = plain("networks", layers=1).bank
    for weight, bound in ((networks.weights[0], 25**-0.5), (networks.weights[1], 100**-0.5)):
        assert_fills(weight, bound)
    for bias, bound in ((networks.biases[0], 25**-0.5), (networks.biases[1], 100**-0.5)):
        assert_fills(bias, bound)
    lora = plain("lora").bank
    assert_fills(lora.w_in, 25**-0.5)
    assert not lora.w_out.any()


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("router", ["cosine", "topk"])
def test_one_convolutional_expert_is_two_convolutions(kernel, router):
    layer = make_layer("conv", router, bank={"kernel": kernel}, num_experts=1, activation="relu")
    first = nn.Conv2d(5, 12, kernel, padding=kernel // 2).double()
    second = nn.Conv2d(12, 4, 1).double()
    with torch.no_grad():
        first.weight.copy_(layer.bank.w_in)
        first.bias.copy_(layer.bank.b_in)
        second.weight.copy_(layer.bank.w_out)
        second.bias.copy_(layer.bank.b_out[0])
    x = samples("conv")
    y = layer(x)
    assert y.shape == (6, 4, 3, 4)
    torch.testing.assert_close(y, second(first(x).relu()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [0, -1, 2])
def test_kernels_without_a_middle_are_refused(kernel):
    with pytest.raises(UserError, match=f"kernel={kernel} must be odd and at least 1"):
        plain("conv", kernel=kernel)


def test_rows_are_no_images():
    with pytest.raises(UserError, match=r"bank conv takes images .* the shape \(3, 25\)"):
        plain("conv")(torch.randn(3, 25))


def test_images_are_routed_by_their_channel_means():
    layer, x = make_layer("conv"), samples("conv")
    layer(x)
    expected = layer.router(x.mean(dim=(2, 3))).gates
    torch.testing.assert_close(layer.last_routing.gates, expected)


@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 5), (4, 2, 3, 5)], ids=str)
def test_affine_experts_take_samples_of_any_shape(shape):
    layer, x = make_layer("affine", gate_scale="one"), torch.randn(shape, dtype=torch.double)
    gates = layer.router(x.reshape(4, -1, 5).mean(dim=1)).gates
    expected = torch.zeros_like(x)
    for n in range(4):
        gamma, beta = gates[n] @ layer.bank.gamma, gates[n] @ layer.bank.beta
        expected[n] = x[n] * gamma + beta
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def seeded_affine() -> nn.Module:
    torch.manual_seed(1)
    return plain("affine", 4000, 4000, init_scale=0.1).bank


def test_affine_rows_start_silent_or_as_asked_and_learn():
    layer, x = plain("affine"), torch.randn(8, 25)
    assert not layer(x).any()
    layer(x).square().sum().backward()
    assert not layer.bank.gamma.grad.any()  # at the minimum of that loss
    (layer(x) - 1).square().sum().backward()
    for rows in (layer.bank.gamma, layer.bank.beta):
        assert rows.grad[:4].any(dim=1).all() and not rows.grad[4:].any()
    drawn, again = (seeded_affine() for _ in range(2))
    assert torch.equal(drawn.gamma, again.gamma) and not torch.equal(drawn.gamma, drawn.beta)
    for rows in (drawn.gamma, drawn.beta):
        assert rows.std().item() == pytest.approx(0.1, rel=0.03)
        assert abs(rows.mean().item()) < 0.005


def test_affine_experts_cannot_change_the_width():
    with pytest.raises(UserError, match=r"25 is not 10; use another bank"):
        plain("affine", 25, 10)
    with pytest.raises(UserError, match=r"init_scale=-1.0 must be at least 0"):
        plain("affine", init_scale=-1.0)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("router", ["cosine", "topk"])
def test_one_network_is_an_mlp(layers, router):
    layer = make_layer("networks", router, bank={"layers": layers}, num_experts=1)
    widths, mlp = [5, *[12] * layers, 4], nn.Sequential()
    assert len(layer.bank.weights) == layers + 1
    for depth in range(layers + 1):
        linear = nn.Linear(widths[depth], widths[depth + 1]).double()
        with torch.no_grad():
            linear.weight.copy_(layer.bank.weights[depth][0])
            linear.bias.copy_(layer.bank.biases[depth][0])
        mlp.extend([linear, nn.Tanh()])
    x = samples("networks")
    torch.testing.assert_close(layer(x), mlp[:-1](x), rtol=1e-12, atol=1e-12)


def test_networks_share_the_units_at_the_start():
    bank = plain("networks", hidden=42, layers=3).bank
    assert [tuple(w.shape) for w in bank.weights] == [
        (6, 10, 25), (6, 10, 10), (6, 10, 10), (6, 25, 10)
    ]  # fmt: skip
    with pytest.raises(UserError, match="4 experts cannot share 3 hidden units a layer"):
        plain("networks", hidden=3)
    with pytest.raises(UserError, match="layers=0 must be at least 1"):
        plain("networks", layers=0)

"""LayerNorm with experts, its router, and how its experts grow on a stream."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch._dynamo.testing import CompileCounter
from tta_models import stream, vit

from dynmoe.growth.triggers.changes import DriftTrigger
from dynmoe.growth.triggers.clock import AtTrigger
from dynmoe.interventions.weights import replace_module
from dynmoe.moe import finish_step, moe_layers
from dynmoe.moe.experts.rows import ScaleShift
from dynmoe.tta import MoELayerNorm, adapt
from dynmoe.tta.params import channel_last_norms


def make(
    dim: int = 5, experts: int = 3, room: int | None = None, drawn: bool = True
) -> MoELayerNorm:
    norm = nn.LayerNorm(dim, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = MoELayerNorm(norm, experts, room)
    if drawn:
        nn.init.normal_(layer.experts_weight)
        nn.init.normal_(layer.experts_bias)
        nn.init.normal_(layer.router.weight)
        nn.init.normal_(layer.router.bias)
    return layer


def samples(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double)


@pytest.mark.parametrize("shape", [(7, 4, 5), (7, 2, 3, 5), (7, 5)])
def test_shapes_and_values(shape):
    layer, x = make(), samples(*shape)
    y = layer(x)
    for sample, out in zip(x, y, strict=True):
        u = sample.reshape(-1, 5).mean(0)
        e = int((layer.router.weight @ u + layer.router.bias).argmax())
        scale = layer.bank.base_gamma + layer.experts_weight[e]
        shift = layer.bank.base_beta + layer.experts_bias[e]
        expected = nn.functional.layer_norm(sample, (5,), scale, shift, 1e-3)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples_of_batch", [1, 8, 19])
def test_scale_and_shift_are_torchs_to_the_bit_with_their_gradients(samples_of_batch):
    shape = (samples_of_batch, 33, 16)
    x, gamma, beta = torch.randn(shape), torch.randn(shape[0], 16), torch.randn(shape[0], 16)
    inputs, upstream = [t.requires_grad_() for t in (x, gamma, beta)], torch.randn(shape)
    one = ScaleShift.apply(*inputs)
    other = torch.addcmul(beta.unsqueeze(1), x, gamma.unsqueeze(1))
    assert torch.equal(one, other)
    pairs = [torch.autograd.grad(y, inputs, upstream) for y in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    assert torch.autograd.gradcheck(
        ScaleShift.apply, [t.detach().double()[..., :2].requires_grad_() for t in inputs]
    )


def test_gradients_are_those_of_log_p_and_of_the_rows():
    """Finite differences cannot see them: the gate's value is 1 whatever the router says."""
    layer, x, g = make(), samples(6, 4, 5), samples(6, 4, 5)
    (layer(x) * g).sum().backward()
    got = [p.grad.clone() for p in (layer.experts_weight, layer.router.weight, layer.router.bias)]
    layer.zero_grad()
    z, u = nn.functional.layer_norm(x, (5,), eps=1e-3), x.mean(1)
    log_p = (u @ layer.router.weight.T + layer.router.bias).log_softmax(1)
    total = 0
    for b, e in enumerate(log_p.argmax(1).tolist()):
        change = ((z[b] * layer.experts_weight[e] + layer.experts_bias[e]) * g[b]).sum()
        total = total + change + change.detach() * log_p[b, e]
    total.backward()
    for mine, p in zip(
        got, (layer.experts_weight, layer.router.weight, layer.router.bias), strict=True
    ):
        torch.testing.assert_close(mine, p.grad, rtol=1e-11, atol=1e-12)
        assert mine.abs().max() > 1e-3


def test_the_input_s_gradient():
    layer = make(drawn=False)  # silent experts: y does not depend on the router
    assert torch.autograd.gradcheck(layer, samples(3, 4, 5).requires_grad_())


def test_weights_can_be_exchanged():
    layer, other = make(), make()
    linear = nn.Linear(5, 3).double()
    with torch.no_grad():
        layer.router.weight.copy_(linear.weight)
        layer.router.bias.copy_(linear.bias)
        other.load_state_dict(layer.state_dict())
    x = samples(20, 4, 5)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.layer.last_routing.chosen.int().argmax(1), linear(x.mean(1)).argmax(1))
    assert layer.experts_weight.shape == layer.experts_bias.shape == (3, 5)


def test_one_graph():
    torch._dynamo.reset()
    layer, counter, x = make(room=4), CompileCounter(), samples(6, 4, 5)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), layer(x))
    finish_step(layer)
    layer.router.active[3] = True
    torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_norms_that_are_found_and_replaced():
    shared = nn.LayerNorm(4)
    model = nn.Sequential(
        shared, nn.Sequential(shared, nn.LayerNorm(4)), LayerNorm2d(4),
        nn.LayerNorm((2, 4)), nn.LayerNorm(4, elementwise_affine=False),
    )  # fmt: skip
    assert [name for name, _ in channel_last_norms(model)] == ["0", "1.1"]
    new = nn.Identity()
    replace_module(model, shared, new)
    assert model[0] is model[1][0] is new


@pytest.mark.parametrize("bias", [True, False])
def test_torch_s_own_encoder(bias):
    """Its layers have a fast path that would read past the experts; norms may lack a shift."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, bias=bias)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(8, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(images.flatten(2).transpose(1, 2)).mean(1))

    model, images = Model().eval(), torch.randn(4, 8, 2, 2)
    before = model(images).detach()
    adapter = adapt(model, "moetta", keep=0, lr=0.1)
    torch.testing.assert_close(adapter(images), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        moved = model(images)
    assert (moved - before).abs().max() > 1e-4  # the experts count here, too


def counts(adapter: nn.Module) -> set[int]:
    return {layer.num_experts for _, layer in moe_layers(adapter.model)}


def test_growth_on_a_clock_keeps_what_was_learnt():
    options = {"num_experts": 2, "max_experts": 4, "lr": 0.1}
    adapter = adapt(vit(), "moetta", grow="every", grow_wait=2, **options)
    twin, batches = adapt(vit(), "moetta", **options), stream(9)
    for images in batches[:2]:
        assert counts(adapter) == {2}
        assert torch.equal(adapter(images), twin(images))
    assert counts(adapter) == {3} and counts(twin) == {2}
    norm, same = adapter.norms[0], twin.norms[0]
    assert torch.equal(norm.experts_weight[:2], same.experts_weight[:2])
    assert torch.equal(norm.router.weight[:2], same.router.weight[:2])
    assert not norm.experts_weight[2:].any() and norm.router.weight[2].any()
    state = adapter.optimizer.state[norm.experts_weight]["momentum_buffer"]
    assert state[:2].any() and not state[2:].any()
    for images in batches[2:]:
        assert adapter(images).isfinite().all()
    assert counts(adapter) == {4} and adapter.steps == 9  # and there it ends
    assert [event.step for event in adapter.controller.events] == [2, 4]
    assert adapter.controller.events[0].shock["output_change"] < 1
    adapter.reset()
    assert counts(adapter) == {2} and not adapter.controller.events


def test_growth_when_the_stream_shifts():
    """The Page-Hinkley test sees the batches' mean entropy rise."""
    adapter = adapt(vit(), "moetta", num_experts=2, max_experts=3, lr=1e-6)
    adapter.grow_on(DriftTrigger.Config(cooldown=1, warmup=5, threshold=0.3, delta=0.0))
    sharp = stream(1, size=32)[0]
    sharp = sharp[adapter(sharp).softmax(1).amax(1).argsort(descending=True)]
    for _ in range(10):
        adapter(sharp[:8])
    assert counts(adapter) == {2}
    for _ in range(6):
        adapter(sharp[-8:])
    assert counts(adapter) == {3}
    assert adapter.controller.events[0].step > 11


def test_any_trigger_will_do_and_no_room_means_no_growth():
    adapter = adapt(vit(), "moetta", num_experts=2)
    adapter.grow_on(AtTrigger.Config(steps=(1,)))
    for images in stream(3):
        adapter(images)
    assert counts(adapter) == {2} and not adapter.controller.events


def test_without_a_generator_the_router_follows_the_global_seed():
    norm = nn.LayerNorm(5)
    torch.manual_seed(1)
    first, second = MoELayerNorm(norm, 3, 6), MoELayerNorm(norm, 3, 6)
    assert not torch.equal(first.router.weight, second.router.weight)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(7.0)
    second.router.active.fill_(True)
    torch.manual_seed(1)
    second.reset_parameters()
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)

"""The contract of auxiliary losses, over all that are registered, alone and in a layer."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from loss_tools import given_by, make_layer, make_loss, samples
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, collect_aux_losses, finish_step

LOSSES = registry.names("loss")
RANDOM_UNITS = registry.get("pruning", "random").Config()

needs = {"load": ("noisy-topk",), "loss-free": ("topk", "noisy-topk")}
"""losses that some routers cannot serve -> routers that can"""
ordered = {"gram-schmidt"}
"""losses in which the order of three or more experts counts, as their docstring says"""

CASES = [(n, r) for n in LOSSES for r in needs.get(n, ("cosine", "topk"))]
every_case = pytest.mark.parametrize(("name", "router"), CASES)


def quiet(layer: MoELayer) -> MoELayer:
    """Router in evaluation mode, where it draws no noise."""
    layer.router.eval()
    return layer


def run(name: str, layer: MoELayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A fresh loss on one pass; biases are put back."""
    before = layer.router.selection_bias.clone()
    value = make_loss(name, layer.max_experts)(given_by(layer, x, mask))
    layer.router.selection_bias.copy_(before)
    return value


@every_case
def test_a_scalar_that_is_finite_for_one_living_expert(name, router):
    for experts, n in itertools.product((1, 2, 5), (1, 6)):
        layer = make_layer(router, experts)
        value = run(name, layer, samples(n))
        assert value.shape == () and value.dtype == torch.double and value.isfinite()
        if value.requires_grad:
            value.backward()
        for parameter in layer.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()


@every_case
def test_rows_of_unborn_experts_have_no_influence_and_no_gradient(name, router):
    tight, roomy = quiet(make_layer(router)), quiet(make_layer(router))
    x = samples()
    tight.load_state_dict(roomy.state_dict())
    with torch.no_grad():
        for rows in (*roomy.router.expert_rows(), *roomy.bank.expert_rows()):
            rows[3:] = 1e30
    values = [run(name, layer, x) for layer in (tight, roomy)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    if not values[1].requires_grad:
        return
    values[1].backward()
    for rows in (*roomy.router.expert_rows(), *roomy.bank.expert_rows()):
        assert rows.grad is None or (rows.grad.isfinite().all() and not rows.grad[3:].any())


@every_case
def test_padding_changes_nothing(name, router):
    layer, x = quiet(make_layer(router)), samples(7)
    for junk in (0.0, 50.0):
        padded = torch.cat([x[:3], torch.full((2, 4), junk).double(), x[3:]])
        mask = torch.tensor([True] * 3 + [False] * 2 + [True] * 4)
        torch.testing.assert_close(
            run(name, layer, padded, mask), run(name, layer, x), rtol=1e-12, atol=1e-12
        )
    assert run(name, layer, x, torch.zeros(7, dtype=torch.bool)).isfinite()


@every_case
def test_order_of_samples_and_names_of_experts_do_not_matter(name, router):
    layer, x = quiet(make_layer(router)), samples(12)
    expected = run(name, layer, x)
    torch.testing.assert_close(run(name, layer, x[torch.randperm(12)]), expected)
    if name in ordered:
        return
    order = torch.tensor([2, 0, 1, 3, 4])  # expert order[i] gets the name i
    with torch.no_grad():
        for rows in (*layer.router.expert_rows(), *layer.bank.expert_rows()):
            rows.copy_(rows[order])
    layer.bank.segment.copy_(order.argsort()[layer.bank.segment])
    torch.testing.assert_close(run(name, layer, x), expected, rtol=1e-12, atol=1e-12)


@every_case
def test_extreme_logits_stay_finite_in_float32(name, router):
    layer = make_layer(router).float()
    for scale in (0.0, 1e-4, 1e4):
        layer.zero_grad()
        value = run(name, layer, samples(20, scale).float())
        assert value.isfinite() and value.dtype == torch.float32
        if value.requires_grad:
            value.backward()
        for parameter in layer.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), scale


@every_case
def test_gradcheck(name, router):
    layer, x = quiet(make_layer(router)), samples(5, 0.5)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(*values: Tensor) -> Tensor:
        state = {f"layer.{n}": value for n, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Pass(name, layer), state, (x,))

    if run(name, layer, x).requires_grad:
        assert torch.autograd.gradcheck(function, parameters)


class Pass(torch.nn.Module):
    """One loss on one pass of a layer, as a function of the layer's parameters."""

    def __init__(self, name: str, layer: MoELayer) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> Tensor:
        return run(self.name, self.layer, x)


@every_case
def test_state_goes_through_a_checkpoint(name, router):
    layers = [whole_layer(name, router) for _ in range(2)]
    batches = [samples().float() for _ in range(4)]
    for x in batches[:2]:
        layers[0](x)
        finish_step(layers[0])
    file = io.BytesIO()
    torch.save(layers[0].state_dict(), file)
    file.seek(0)
    layers[1].load_state_dict(torch.load(file, weights_only=True), strict=True)
    twin = copy.deepcopy(layers[0])
    for x in batches[2:]:
        losses = []
        for layer in (layers[0], layers[1], twin):
            layer(x)
            losses.append(collect_aux_losses(layer))
            finish_step(layer)
        assert losses[0] == losses[1] == losses[2]
    for key, value in layers[0].state_dict().items():
        assert torch.equal(value, layers[1].state_dict()[key]), key


def whole_layer(name: str, router: str) -> MoELayer:
    """A float32 layer 4 -> 3 of two experts, with room for six, that has the loss."""
    config = registry.get("loss", name).Config(weight=0.1)
    return MoELayer(
        4, 3, 24, num_experts=2, max_experts=6, losses=(config,),
        router=registry.get("router", router).Config(),
    )  # fmt: skip


@pytest.mark.thin(4)
@every_case
def test_one_graph_through_growths_equal_to_eager(name, router):
    torch._dynamo.reset()
    layer = whole_layer(name, router)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    controller = GrowthController(layer, optimizer, pruning=RANDOM_UNITS)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = samples(9).float()
    for growth in range(4):
        if growth:
            controller.grow(growth)
        twin = copy.deepcopy(layer)
        with torch._dynamo.config.patch(error_on_recompile=growth > 0):
            y = compiled(x)
        losses = collect_aux_losses(layer)
        torch.testing.assert_close(y, twin(x))
        torch.testing.assert_close(losses, collect_aux_losses(twin))
        state, expected = layer.state_dict(), twin.state_dict()
        torch.testing.assert_close(state, expected)
        optimizer.zero_grad()
        (y.square().sum() + sum(losses.values())).backward()
        optimizer.step()
    assert layer.num_experts == 5 and counter.frame_count == 1
    assert all(p.isfinite().all() for p in layer.parameters())


@every_case
def test_training_through_a_growth(name, router):
    layer = whole_layer(name, router)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    controller = GrowthController(layer, optimizer, granularity=2, pruning=RANDOM_UNITS)
    x, errors = samples(40).float(), []
    target = x[:, :3].sin()
    for step in range(12):
        if step == 6:
            controller.grow(step)
        error = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        (error + sum(collect_aux_losses(layer).values())).backward()
        optimizer.step()
        errors.append(error.item())
    assert layer.num_experts == 4
    assert errors[5] < errors[0] and errors[-1] < errors[6]


def test_the_lists_above_name_losses():
    assert set(needs) | ordered <= set(LOSSES)

"""Multi-head mixtures: sub-tokens against a loop, padding, contexts, growth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, MultiHead, moe_layers, routing_inputs

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make(router: str = "softmax", heads: int = 3, **options: object) -> MultiHead:
    """A float64 module 6 -> 9 whose layer has 2 experts and room for 6."""
    layer_options = {"num_experts": 2, "max_experts": 6, "activation": "tanh"} | options
    config = registry.get("router", router).Config()

    def make_layer(dim_in: int, dim_out: int) -> MoELayer:
        return MoELayer(dim_in, dim_out, 12, router=config, **layer_options)

    return MultiHead(6, 9, heads, make_layer).double()


def naive(model: MultiHead, x: Tensor) -> Tensor:
    """Each token [D] by itself: split, one layer call per sub-token, merge."""
    rows = []
    for token in x.reshape(-1, 6):
        whole = model.split.weight @ token + model.split.bias
        width = 6 // model.heads
        parts = [whole[h * width : (h + 1) * width] for h in range(model.heads)]
        outputs = torch.cat([model.layer(part.unsqueeze(0))[0] for part in parts])
        rows.append(model.merge.weight @ outputs + model.merge.bias)
    return torch.stack(rows).view(*x.shape[:-1], 9)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("shape", [(5, 6), (2, 4, 6)], ids=["samples", "tokens"])
def test_sub_tokens_are_routed_one_by_one(shape, heads):
    model, x = make(heads=heads), torch.randn(shape, dtype=torch.double)
    torch.testing.assert_close(model(x), naive(model, x), **EXACT)
    assert len(model.layer.last_routing.gates) == 1  # of the last sub-token above
    model(x)
    assert len(model.layer.last_routing.gates) == x.shape[:-1].numel() * heads


def test_gradcheck():
    model, x = make(), torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    names, values = zip(*model.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize("router", ["softmax", "expert-choice", "slots"])
def test_a_sub_token_is_padding_if_its_token_is(router):
    model, x = make(router), torch.randn(2, 4, 6, dtype=torch.double)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    y = model(x, mask)
    assert not y[~mask].any() and y[mask].all()
    other = torch.where(mask.unsqueeze(2), x, 50.0)
    torch.testing.assert_close(model(other, mask), y, **EXACT)
    torch.testing.assert_close(model(x[:1, mask[0]]), y[:1, mask[0]], **EXACT)
    assert model.layer.last_routing.gates.shape[0] == 9
    with routing_inputs(model, mask):
        assert torch.equal(model(x), y)
    flat = model(x.flatten(0, 1)[:4], mask.flatten()[:4])
    assert not flat[2].any() and flat[3].any()


@pytest.mark.parametrize("per", ["position", "sample"])
def test_contexts_reach_every_sub_token(per):
    model = make("oracle")
    x = torch.randn(2, 4, 6, dtype=torch.double)
    context = (
        torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]) if per == "position" else torch.tensor([1, 0])
    )
    each = context if per == "position" else context.unsqueeze(1).expand(2, 4)
    model(x, context=context)
    owner = model.layer.last_routing.gates.argmax(dim=1).view(2, 4, 3)
    assert torch.equal(owner, each.unsqueeze(2).expand(2, 4, 3))
    with routing_inputs(model, context=context):
        model(x)
    assert torch.equal(model.layer.last_routing.gates.argmax(dim=1).view(2, 4, 3), owner)


def test_routing_by_sample_takes_one_mask_entry_per_sample():
    model = make(route_per="sample")
    x, mask = torch.randn(3, 4, 6, dtype=torch.double), torch.tensor([True, False, True])
    y = model(x, mask)
    assert not y[1].any() and y[[0, 2]].all()
    torch.testing.assert_close(model(x[[0, 2]]), y[[0, 2]], **EXACT)


@pytest.mark.parametrize("router", ["cosine", "expert-choice"])
def test_it_grows_in_training_under_one_graph(router):
    torch._dynamo.reset()
    model = make(router)
    assert [name for name, _ in moe_layers(model)] == ["layer"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    controller = GrowthController(model, optimizer, granularity=2)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(3, 4, 6, dtype=torch.double)
    target, mask = torch.randn(3, 4, 9, dtype=torch.double), torch.arange(4).expand(3, 4) < 3
    for experts in (2, 4, 6):
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=experts > 2):
                y = compiled(x, mask)
            torch.testing.assert_close(y, model(x, mask))
            loss = (y - target)[mask].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        assert model.layer.num_experts == experts
        if experts < 6:
            controller.grow(experts, (x, None))
    assert counter.frame_count == 1


def test_state_and_seed():
    def seeded() -> MultiHead:
        generator = torch.Generator().manual_seed(3)
        return MultiHead(
            6, 9, 3, lambda i, o: MoELayer(i, o, 12, generator=generator), generator
        ).double()

    state = torch.get_rng_state()
    first, second = seeded(), seeded()
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 6, dtype=torch.double)
    assert torch.equal(first(x), second(x))
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("heads", [0, 2, 4])
def test_heads_must_divide_both_widths(heads):
    with pytest.raises(UserError, match=f"heads={heads} must be at least 1 and divide .* 6 and 9"):
        make(heads=heads)

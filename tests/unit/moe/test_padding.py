"""Padding reaches nothing, whatever stands in it; batches at the edge of what there can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, MultiHead, collect_aux_losses, finish_step, routing_inputs
from dynmoe.moe.draws import Noise
from dynmoe.moe.experts.pool import ConvPool

DIM, TOKENS = 6, 4
ROUTERS = registry.names("router")
LOSSES = registry.names("loss")
BANKS = registry.names("bank")
NASTY = [float("nan"), float("inf"), -1e30]


def make_layer(
    router: str = "cosine", loss: str = "none", bank: str = "pool", **options
) -> MoELayer:
    return MoELayer(
        DIM,
        DIM,
        24,
        num_experts=3,
        max_experts=4,
        router=registry.get("router", router).Config(),
        bank=registry.get("bank", bank).Config(),
        losses=[registry.get("loss", loss).Config(weight=0.3)],
        generator=torch.Generator().manual_seed(0),
        **options,
    ).double()


def usable(**parts: str) -> bool:
    """Whether the parts go together; a layer refuses the others."""
    layer = make_layer(**parts)
    try:
        layer(batch_for(layer, 3), context=torch.zeros(3, dtype=torch.long))
    except UserError:
        return False
    return True


def batch_for(layer: MoELayer, samples: int, tokens: int = TOKENS) -> Tensor:
    """A batch of what the layer takes: images or sequences."""
    shape = (samples, DIM, 2, 2) if isinstance(layer.bank, ConvPool) else (samples, tokens, DIM)
    return torch.randn(shape, dtype=torch.double)


def silent(layer: MoELayer) -> MoELayer:
    """The layer, still in training mode, with its noise switched off."""
    for module in layer.modules():
        if isinstance(module, Noise):
            module.eval()
    return layer


CASES = [
    {"router": router, "loss": loss, "bank": bank}
    for router in ROUTERS
    for loss in LOSSES
    for bank in BANKS
    if (router == "topk" and bank == "pool")
    or (loss == "none" and bank == "pool")
    or (loss == "none" and router in ("cosine", "topk"))
    if usable(router=router, loss=loss, bank=bank)
]
every_case = pytest.mark.parametrize("parts", CASES, ids=lambda p: "-".join(p.values()))


def run(layer: MoELayer, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Output, gradients and state of one training step."""
    x = x.detach().requires_grad_()
    context = torch.arange(len(x)) % 3
    y = layer(x, mask=mask, context=context)
    loss = y.square().sum() + sum(collect_aux_losses(layer).values())
    loss.backward()
    finish_step(layer)
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y, "x": x.grad, "loss": loss, **grads, **layer.state_dict()}


@every_case
@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.thin(60)
def test_what_stands_in_padding_reaches_nothing(parts, nasty):
    torch.manual_seed(0)
    layer = make_layer(**parts)
    x = batch_for(layer, 3)
    mask = torch.tensor([True, False, True])
    if not layer.bank.per_sample:
        mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    clean, dirty = x.clone(), x.clone()
    clean[~mask], dirty[~mask] = 0.0, nasty
    torch.manual_seed(1)
    expected = run(make_layer(**parts), clean, mask)
    torch.manual_seed(1)
    got = run(make_layer(**parts), dirty, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not got["y"][~mask].any() and not got["x"][~mask].any()
    assert all(v.isfinite().all() for n, v in got.items() if v.is_floating_point())


@every_case
def test_padded_rows_are_as_if_they_were_not_there(parts):
    """Single samples: the padded batch equals the batch of its real rows.

    Without the noise of routers, which hangs on a row's place in the batch.
    """
    layer = silent(make_layer(**parts))
    x, mask = batch_for(layer, 5, 1), torch.tensor([1, 0, 1, 1, 0]).bool()
    if not layer.bank.per_sample:
        x = x.flatten(0, 1)
    padded = run(layer, x, mask)
    kept = x[mask].detach().requires_grad_()
    alone_layer = silent(make_layer(**parts))
    y = alone_layer(kept, context=(torch.arange(5) % 3)[mask])
    loss = y.square().sum() + sum(collect_aux_losses(alone_layer).values())
    torch.testing.assert_close(padded["y"][mask], y)
    torch.testing.assert_close(padded["loss"], loss)


@every_case
@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.thin(80)
def test_empty_and_single_batches(parts, samples, tokens):
    layer = make_layer(**parts)
    x = batch_for(layer, samples, tokens)
    result = run(layer, x, None)
    assert result["y"].shape == x.shape
    assert all(v.isfinite().all() for v in result.values() if v.is_floating_point())


@every_case
def test_a_batch_of_nothing_but_padding(parts):
    layer = make_layer(**parts)
    before = {n: v.clone() for n, v in layer.state_dict().items()}
    x = batch_for(layer, 2)
    mask = torch.zeros(2 if layer.bank.per_sample else (2, TOKENS), dtype=torch.bool)
    result = run(layer, x, mask)
    assert not result["y"].any() and not result["x"].any()
    assert all(v.isfinite().all() for v in result.values() if v.is_floating_point())
    for name, value in layer.state_dict().items():
        if not name.endswith("noise.step"):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_tokens_of_sequences_of_one_compete_with_nobody():
    layer = make_layer("expert-choice").eval()
    x = torch.randn(5, 1, DIM, dtype=torch.double)
    alone = torch.cat([layer(row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(layer(x), alone)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.int32, torch.uint8, torch.float32])
def test_masks_of_every_type_that_says_yes_or_no(dtype):
    layer, x = make_layer("topk", route_per="token"), batch_for(make_layer(), 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(layer(x, mask.to(dtype)), layer(x, mask.bool()))


@pytest.mark.parametrize("shape", [(TOKENS, 2), (2,), (2, TOKENS + 1), (2, TOKENS, 1), (8,)])
def test_a_mask_of_another_shape_is_refused(shape):
    layer, x = make_layer(), batch_for(make_layer(), 2)
    with pytest.raises(UserError, match=r"needs one entry per position, \[2, 4\]"):
        layer(x, torch.ones(shape))
    with pytest.raises(UserError, match="needs one entry per position"):
        MultiHead(DIM, DIM, 2, lambda i, o: MoELayer(i, o, 8, num_experts=2)).double()(
            x, torch.ones(shape)
        )


def test_a_mask_to_be_added_is_refused():
    layer, x = make_layer(), batch_for(make_layer(), 2)
    mask = torch.zeros(2, TOKENS).masked_fill(torch.ones(2, TOKENS).bool(), float("-inf"))
    with pytest.raises(UserError, match="must hold 0 for padding and 1 for what is real"):
        layer(x, mask)


def test_samples_are_routed_by_the_mean_of_their_real_positions():
    layer = make_layer("softmax", route_per="sample").eval()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    y = layer(x, mask)
    torch.testing.assert_close(y[0, :2], layer(x[:1, :2])[0])
    torch.testing.assert_close(y[1], layer(x[1:])[0])
    assert not y[0, 2:].any()


def test_masks_of_a_whole_model_reach_layers_that_see_flat_positions():
    layer, x = make_layer("topk"), torch.randn(2, TOKENS, DIM, dtype=torch.double)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    with routing_inputs(layer, mask=mask):
        flat = layer(x.flatten(0, 1))
    torch.testing.assert_close(flat.view(x.shape), layer(x, mask))


def test_padding_is_silent_in_multi_head_layers():
    def make(dim_in: int, dim_out: int) -> MoELayer:
        return MoELayer(dim_in, dim_out, 12, num_experts=2)

    layer = MultiHead(DIM, DIM, 2, make).double()
    x, mask = torch.randn(2, TOKENS, DIM, dtype=torch.double), torch.ones(2, TOKENS).bool()
    mask[0, 1] = False
    x[0, 1] = float("nan")
    y = layer(x, mask)
    y.sum().backward()
    assert y.isfinite().all() and not y[0, 1].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_contexts_of_padding_are_blanked_too():
    config = registry.get("router", "prototypes").Config(use="context", context_dim=2, patience=1)
    layer = MoELayer(DIM, DIM, 24, num_experts=3, router=config)
    context, mask = torch.randn(5, 2), torch.tensor([1, 1, 0, 1, 1])
    context[2] = float("nan")
    layer(torch.randn(5, DIM), mask=mask, context=context).sum().backward()
    finish_step(layer)
    assert layer.router.weight.isfinite().all()

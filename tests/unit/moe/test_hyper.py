"""HyperMoE against a loop that builds every row's own expert from the idle ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer
from dynmoe.moe.hyper import HyperMoE


def make(experts: int = 3, router: str = "topk", seed: int | None = 0, **options) -> HyperMoE:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    options = {"gamma": 0.7} | options
    return HyperMoE(
        6, 4,
        lambda i, o: MoELayer(i, o, 12, num_experts=experts, max_experts=5, router=router,
                              generator=generator),
        code_dim=3, hidden=2, generator=generator, **options,
    )  # fmt: skip


def learnt(hyper: HyperMoE) -> HyperMoE:
    """In float64, the generated expert no longer silent."""
    nn.init.uniform_(hyper.up, -1, 1)
    return hyper.double()


def loop(hyper: HyperMoE, x: Tensor) -> Tensor:
    """Row by row: the layer, and the two matrices of the row's own expert."""
    layer, rows = hyper.layer, []
    for row in x:
        y = layer(row.unsqueeze(0))[0]
        chosen = set(layer.last_routing.chosen[0].nonzero().flatten().tolist())
        idle = [e for e in range(layer.num_experts) if e not in chosen]
        if idle:
            mean = sum(hyper.codes[e] for e in idle) / len(idle)
            z = hyper.encoder.weight @ mean + hyper.encoder.bias
            z = z / (1 + torch.exp(-z))
            down = sum(z[c] * hyper.down[c] for c in range(3))
            up = sum(z[c] * hyper.up[c] for c in range(3))
            y = y + 0.7 * up @ (down @ row).clamp(min=0)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_equals_the_loop_with_gradients(experts):
    """With two experts and K = 2 none is idle, and the layer is alone."""
    hyper, x = learnt(make(experts)), torch.randn(7, 6, dtype=torch.double)
    names, parameters = zip(*hyper.named_parameters(), strict=True)
    found, expected = hyper(x), loop(hyper, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
                 for y in (found, expected)]  # fmt: skip
    for name, got, want in zip(names, *gradients, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, msg=name)
    assert bool(gradients[0][names.index("codes")].any()) == (experts > 2)
    torch.testing.assert_close(hyper(x.view(1, 7, 6))[0], expected)


def test_it_starts_as_the_layer_and_a_reset_brings_it_back():
    hyper, again = make(), make()
    x = torch.randn(5, 6)
    assert torch.equal(hyper(x), hyper.layer(x))
    for parameter in hyper.parameters():
        nn.init.uniform_(parameter)
    hyper.reset_parameters(torch.Generator().manual_seed(0))
    torch.testing.assert_close(hyper.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_growth_is_followed():
    """A new expert's code moves the others' means from its first pass, and is taught."""
    hyper = learnt(make(2, "switch"))
    hyper.layer.router.jitter = 0.0
    optimizer = torch.optim.Adam(hyper.parameters(), 1e-2)
    controller, x = GrowthController(hyper, optimizer), torch.randn(20, 6, dtype=torch.double)
    for experts in (2, 3):
        assert hyper.layer.num_experts == experts
        torch.testing.assert_close(hyper(x), loop(hyper, x))
        before = hyper.codes.detach().clone()
        optimizer.zero_grad()
        (hyper(x) - 1).square().sum().backward()
        optimizer.step()
        assert (hyper.codes != before).any(dim=1).tolist() == [e < experts for e in range(5)]
        if experts == 2:
            event = controller.grow(1, (x, None))
            assert event.experts == 3


def test_padding_reaches_nothing():
    hyper, x = learnt(make(4)), torch.randn(2, 3, 6, dtype=torch.double)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    dirty = torch.where(mask.unsqueeze(2), x, float("nan"))
    y = hyper(dirty, mask)
    assert not y[~mask].any()
    torch.testing.assert_close(y[mask], loop(hyper, x[mask]))


def test_whole_samples_share_their_expert():
    hyper = learnt(make(4))
    hyper.layer.route_per = "sample"
    x = torch.randn(3, 4, 6, dtype=torch.double)
    y = hyper(x)
    for sample, out in zip(x, y, strict=True):
        alone = hyper(sample.unsqueeze(0))[0]
        torch.testing.assert_close(out, alone)


def test_what_cannot_work():
    with pytest.raises(UserError, match="router softmax uses every expert"):
        make(router="softmax")(torch.randn(2, 6))
    with pytest.raises(UserError, match="hidden=0 must be at least 1"):
        HyperMoE(6, 4, lambda i, o: MoELayer(i, o, 12), hidden=0)
    with pytest.raises(UserError, match="bank affine takes whole samples"):
        HyperMoE(6, 6, lambda i, o: MoELayer(i, o, 12, bank="affine"))

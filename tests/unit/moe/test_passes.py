"""State moves once per optimizer step: recomputation, repeated use and acting change nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, collect_aux_losses, finish_step, register_step_hook
from dynmoe.moe.passes import MOST_PASSES, StepNotes

DIM = 6
ROUTERS = registry.names("router")
LOSSES = registry.names("loss")
OPTIONS = {"switch": {"jitter": 0.1}, "relu": {"strength": 0.1}, "prototypes": {"patience": 2}}
Run = Callable[[nn.Module, Tensor], Tensor]

KINDS: dict[str, Run] = {
    "plain": lambda layer, x: layer(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
}
recomputed = pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])


def make_layer(router: str, loss: str = "none") -> MoELayer:
    layer = MoELayer(
        DIM,
        DIM,
        24,
        num_experts=3,
        max_experts=4,
        router=registry.get("router", router).Config(**OPTIONS.get(router, {})),
        losses=[registry.get("loss", loss).Config(weight=0.3)],
        generator=torch.Generator().manual_seed(0),
    )
    return layer.double()


def inputs(seed: int = 0, rows: int = 20) -> Tensor:
    draws = torch.randn(
        rows, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(seed)
    )
    return draws.requires_grad_()


def usable(router: str, loss: str) -> bool:
    """Whether the router and the loss go together; a layer refuses the other pairs."""
    try:
        make_layer(router, loss)(inputs())
    except UserError:
        return False
    return True


PAIRS = [
    (router, loss)
    for router in ROUTERS
    for loss in LOSSES
    if loss in ("none", "loss-free", "global-balance") or router in ("cosine", "noisy-topk")
    if router != "oracle" and usable(router, loss)  # without labels the oracle routes nothing
]
"""Every router with the losses that keep state, every loss with a soft and a sparse router."""


def train(layer: MoELayer, run: Run, steps: int = 3, uses: int = 2) -> dict[str, Tensor]:
    """The state after steps of several passes each, and the gradients of the last one."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    register_step_hook(layer, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        for use in range(uses):  # accumulation: as many backward passes
            y = run(layer, inputs(10 * step + use))
            (y.square().mean() + sum(collect_aux_losses(layer).values())).backward()
        optimizer.step()
    gradients = {f"grad {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {**layer.state_dict(), **gradients}


@recomputed
@pytest.mark.thin(54)
@pytest.mark.parametrize(("router", "loss"), PAIRS)
def test_checkpoints_train_as_without(router, loss, kind):
    plain = train(make_layer(router, loss), KINDS["plain"])
    if router in ("noisy-topk", "switch", "token") and kind == "reentrant":
        # Its first passes have no gradient and draw the numbers of such passes.
        again = train(make_layer(router, loss), KINDS[kind])
        assert all(value.isfinite().all() for value in again.values() if value.is_floating_point())
        return
    again = train(make_layer(router, loss), KINDS[kind])
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


@recomputed
@pytest.mark.parametrize("router", ["noisy-topk", "switch", "token"])
def test_recomputed_passes_draw_the_same_noise(router, kind):
    """Against differences of the pass itself, whose noise stays as long as no step is done."""
    layer, x = make_layer(router, "none"), inputs(rows=4)
    state = torch.get_rng_state()
    y = KINDS[kind](layer, x)
    y.square().sum().backward()

    def value(x: Tensor) -> Tensor:
        """The same pass: its number comes from the generator's state."""
        torch.set_rng_state(state)
        return layer(x).square().sum()

    with torch.set_grad_enabled(kind == "non-reentrant"):
        assert value(x).item() == pytest.approx(y.square().sum().item(), rel=1e-12)
        for i, j in ((0, 0), (1, 3), (3, 5)):
            step = torch.zeros_like(x)
            step[i, j] = 1e-6
            slope = (value(x + step) - value(x - step)).item() / 2e-6
            assert x.grad[i, j].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@recomputed
def test_losses_have_their_gradient_and_factor_under_checkpoints(kind):
    grads = []
    for run in (KINDS["plain"], KINDS[kind]):
        layer = make_layer("topk", "switch")
        y = run(layer, inputs())
        (y.sum() + 7.0 * collect_aux_losses(layer)[".switch"]).backward()
        grads.append({n: p.grad for n, p in layer.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("router", "loss"), PAIRS)
@pytest.mark.thin(40)
def test_acting_without_learning_changes_nothing(router, loss):
    layers = [make_layer(router, loss) for _ in range(2)]
    optimizers = [torch.optim.SGD(layer.parameters(), 0.05) for layer in layers]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        register_step_hook(layer, optimizer)
    for step in range(3):
        before = copy.deepcopy(layers[0].state_dict())
        with torch.no_grad():
            layers[0](inputs(100 + step))
        layers[0].collect_losses()
        torch.testing.assert_close(layers[0].state_dict(), before, rtol=0, atol=0)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            loss_value = layer(inputs(step)).square().mean()
            (loss_value + sum(collect_aux_losses(layer).values())).backward()
            optimizer.step()
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("router", "loss"), PAIRS)
def test_the_forward_pass_moves_no_state(router, loss):
    layer = make_layer(router, loss)
    before = copy.deepcopy(layer.state_dict())
    for seed in range(3):
        layer(inputs(seed))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_losses_of_all_passes_are_kept_until_collected():
    layer, separate = make_layer("topk", "switch"), make_layer("topk", "switch")
    expected = torch.zeros((), dtype=torch.double)
    for seed in range(3):
        layer(inputs(seed))
        separate(inputs(seed))
        expected = expected + separate.last_losses["switch"]
    torch.testing.assert_close(collect_aux_losses(layer)[".switch"], expected)
    assert collect_aux_losses(layer) == {}
    layer(inputs())
    finish_step(layer)
    assert collect_aux_losses(layer) == {}


@pytest.mark.parametrize(
    ("router", "loss", "buffer"),
    [
        ("topk", "loss-free", "router.selection_bias"),
        ("relu", "none", "router.strength"),
        ("prototypes", "none", "router.weight"),
        ("noisy-topk", "none", "router.noise.step"),
    ],
)
def test_the_hook_moves_what_the_passes_noted(router, loss, buffer):
    layer = make_layer(router, loss)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    handle = register_step_hook(layer, optimizer)
    before = layer.state_dict()[buffer].clone()
    layer(inputs()).sum().backward()
    assert torch.equal(layer.state_dict()[buffer], before)
    optimizer.step()
    moved = layer.state_dict()[buffer].clone()
    assert not torch.equal(moved, before)
    optimizer.step()  # no pass since: nothing moves
    assert torch.equal(layer.state_dict()[buffer], moved)
    handle.remove()
    layer(inputs()).sum().backward()
    optimizer.step()
    assert torch.equal(layer.state_dict()[buffer], moved)


def test_two_passes_of_a_step_count_as_their_union():
    """k-means and bias balancing see one batch, however it is split."""
    for router, loss in (("topk", "loss-free"), ("prototypes", "none"), ("relu", "none")):
        whole, split = make_layer(router, loss), make_layer(router, loss)
        x = inputs(rows=30)
        whole(x)
        for part in x.split([11, 19]):
            split(part)
        for layer in (whole, split):
            finish_step(layer)
        torch.testing.assert_close(split.state_dict(), whole.state_dict())


def test_a_forgotten_hook_is_told_once():
    layer = make_layer("topk", "loss-free")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(MOST_PASSES + 5):
            layer(inputs(rows=2))
            layer.collect_losses()
    texts = [str(w.message) for w in caught]
    assert any("register_step_hook(model, optimizer)" in text for text in texts)


@pytest.mark.parametrize(
    ("router", "loss"),
    [
        *((router, "none") for router in ROUTERS if router != "oracle"),
        *(("topk", loss) for loss in LOSSES if loss != "load"),
    ],
)
def test_training_passes_change_no_buffer(router, loss):
    """Data parallel gives all processes rank 0's before a pass; draws are alike on all of them."""
    layer = make_layer(router, loss)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer(inputs())
    changed = [n for n, b in layer.named_buffers() if not torch.equal(b, before[n])]
    assert [name for name in changed if not name.endswith("noise.drawn")] == []


@pytest.mark.parametrize(
    ("router", "loss"),
    [("topk", "loss-free"), ("relu", "none"), ("prototypes", "none"), ("gaussian", "none")],
)
def test_what_passes_noted_goes_along_with_the_module(router, loss):
    layer = make_layer(router, loss)
    layer(inputs())
    layers = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for one in layers:
        finish_step(one)
        torch.testing.assert_close(one.state_dict(), layer.state_dict(), rtol=0, atol=0)
    (holder,) = [m for m in layer.modules() if isinstance(m, StepNotes) and m.step_notes]
    assert any(noted.dtype in (torch.long, torch.double) for noted in holder.notes())
    assert all(noted.dtype in (torch.long, torch.half) for noted in holder.half().notes())
    assert all(noted.is_meta for noted in holder.to("meta").notes())


def test_notes_follow_the_data_where_only_parameters_and_buffers_were_moved():
    layer = make_layer("gaussian")
    held = [tensor for m in layer.modules() for tensor in (m._parameters, m._buffers)]
    for tensors in held:
        tensors.update({n: t if t is None else t.to("meta") for n, t in tensors.items()})
    layer.router.notes_to(layer.router.active.device)
    assert all(noted.is_meta for noted in layer.router.notes())

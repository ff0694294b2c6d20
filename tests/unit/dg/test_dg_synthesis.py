"""MoE²'s per-image synthesis against dense updates of one sample at a time."""

from __future__ import annotations

import pytest
import torch
from dg_cases import CLASSES, bank_of, images, make, reference, scatter, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe.dg.backbone import features
from dynmoe.errors import UserError

both = pytest.mark.parametrize("synthesis", ["factors", "deltas"])
adapters = pytest.mark.parametrize("adapter", ["kadaptation", "lora"])


@both
@adapters
def test_logits_and_gradients_equal_the_dense_reference(synthesis, adapter):
    method = scatter(make("moe2", experts=3, synthesis=synthesis, adapter=adapter)).eval()
    x = images()
    phi = features(method.backbone, x).detach()
    logits = method(x)
    rows = []
    for n in range(len(x)):
        scores = [phi[n] @ v / (phi[n].norm() * v.norm()) / 0.5 for v in method.outer.router.weight]
        weights = torch.stack(scores).exp()
        rows.append(reference(method, x[n], weights / weights.sum()))
    expected = torch.stack(rows)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    trainable = dict(method.named_parameters())
    trainable = {n: p for n, p in trainable.items() if p.requires_grad}
    direction = torch.randn_like(logits)
    got = torch.autograd.grad(logits, trainable.values(), direction)
    want = torch.autograd.grad(expected, trainable.values(), direction)
    for name, a, b in zip(trainable, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
        assert b.abs().max() > 1e-6, name


def test_the_two_ways_differ_but_for_one_hot_weights_and_equal_sets():
    torch.manual_seed(3)
    factors = scatter(make("moe2", experts=2)).eval()
    deltas = make("moe2", experts=2, synthesis="deltas").eval()
    deltas.load_state_dict(factors.state_dict())
    x = images()
    assert (factors(x) - deltas(x)).abs().max() > 1e-2
    one_hot = torch.eye(2, dtype=torch.double)[[0, 1, 1, 0]]
    torch.testing.assert_close(
        factors.forward_with(x, one_hot), deltas.forward_with(x, one_hot), rtol=1e-10, atol=1e-10
    )
    with torch.no_grad():
        for method in (factors, deltas):
            for rows in bank_of(method).rows.values():
                rows[1] = rows[0]
    torch.testing.assert_close(factors(x), deltas(x), rtol=1e-10, atol=1e-10)


@both
@settings(max_examples=10, deadline=None)
@given(data=st.data(), count=st.integers(1, 5))
def test_images_do_not_see_each_other(synthesis, data, count):
    torch.manual_seed(0)
    method, x = scatter(make("moe2", synthesis=synthesis)).eval(), images(count)
    order = data.draw(st.permutations(range(count)))
    torch.testing.assert_close(method(x[order]), method(x)[order], rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@both
def test_no_dense_update_per_sample_is_made(synthesis):
    """Nor anything as large, in the forward and the backward pass."""
    batch, dim = 12, 48
    method = make("moe2", tiny_vit(dim, 2), synthesis=synthesis, experts=2, gate_dim=4)
    x = images(batch)
    with Largest() as seen:
        method.loss(x, torch.arange(batch) % CLASSES)[0].backward()
    assert seen.numel < batch * dim * 3 * dim
    with Largest() as seen:
        torch.einsum("bi,bj->bij", torch.ones(batch, dim), torch.ones(batch, 3 * dim))
    assert seen.numel == batch * dim * 3 * dim  # it would be noticed


@both
def test_a_kept_embedding_gives_the_same(synthesis):
    method, x = scatter(make("moe2", synthesis=synthesis)).eval(), images()
    phi = method.embed(x)
    assert phi.shape == (4, 16) and not phi.requires_grad
    assert torch.equal(method(x), method(x, phi))
    assert not torch.equal(method(x), method(x, phi.flip(0)))


@pytest.mark.thin(1)
@both
def test_compiled_it_is_the_same_in_one_graph(synthesis):
    method, x = scatter(make("moe2", synthesis=synthesis, max_experts=7)).eval(), images()
    expected = method(x).detach()
    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_a_pass_that_fails_leaves_no_parameters_behind():
    method = make("moe2").eval()
    with pytest.raises(AssertionError):
        method(torch.zeros(1, 3, 7, 7, dtype=torch.double), torch.zeros(1, 16, dtype=torch.double))
    assert all(layer.theta is None for layer in method.layers)


def test_sets_start_alike_but_for_noise_and_prototypes_on_the_sphere():
    method = make("moe2", experts=4, init_noise=1e-4)
    rows = bank_of(method).rows
    for name, values in rows.items():
        apart = values[1:] - values[:1]
        assert 0 < apart.abs().max() < 1e-3, name
    flat = torch.cat([v.flatten(1) for v in rows.values()], dim=1)
    assert abs((flat[0] - flat[1]).std() / (1e-4 * 2**0.5) - 1) < 0.2
    norms = method.outer.router.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=1e-6)
    same = make("moe2", experts=4, init_noise=0.0)
    assert all(torch.equal(v[0], v[3]) for v in bank_of(same).rows.values())


def test_the_objective_is_the_sum_of_its_parts():
    method = make("moe2", experts=3, dropout=0.0)
    x, labels = images(), torch.tensor([0, 2, 1, 1])
    total, parts = method.loss(x, labels)
    assert list(parts) == ["classification", "balance", "diversity"]
    torch.testing.assert_close(total, sum(parts.values()))
    v = method.outer.router.weight
    pairs = [torch.exp(-(v[i] - v[j]).norm()) for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(parts["diversity"], 0.2 * sum(pairs) / 6)
    balances = [layer.last_balance for layer in method.layers]
    assert len(balances) == 2
    torch.testing.assert_close(parts["balance"], 0.01 * sum(balances))
    assert method.eval().loss(x, labels)[1].keys() == {"classification"}
    p = method(x).log_softmax(dim=1)
    target = 0.9 * torch.eye(3)[labels] + 0.1 / 3
    expected = -(target * p).sum(dim=1).mean()
    torch.testing.assert_close(method.loss(x, labels)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "moe2: experts=0 must be at least 1"),
        ({"experts": 3, "max_experts": 2}, "experts=3 must be at least 1 and at most max_exp"),
        ({"synthesis": "outputs"}, "synthesis='outputs' must be one of factors, deltas"),
        ({"adapter": "none"}, "adapter='none' must be one of kadaptation, lora"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"diversity_form": "l1"}, "form='l1' must be one of euclidean, cosine, kl"),
        ({"init_noise": -1.0}, "init_noise=-1.0 must be a number of at least 0"),
        ({"smoothing": 1.0}, "smoothing=1.0 must be at least 0 and below 1"),
        ({"terms": 5}, "terms=5 must divide the layers' widths, and 16 is one"),
        ({"ranks": ()}, r"ranks=\(\) must be at least one number"),
        ({"gate_dim": 0}, "gate_dim=0 and every=2 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"balance": float("nan")}, "balance=nan must be a number of at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make("moe2", **options)

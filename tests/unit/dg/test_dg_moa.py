"""The MoA layer: adapters, token gate, noise, dropout and load balancing, restated."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from dg_cases import images, make, scatter, tiny_vit
from torch import Tensor, nn

from dynmoe.dg.adapters import (
    Factors,
    KroneckerAdapter,
    SharedFactors,
    default_terms,
    update,
)
from dynmoe.dg.moa import MoAConfig, MoALinear, Theta, balance_loss, gate_logits
from dynmoe.errors import UserError
from dynmoe.moe.draws import Noise

B, N, D, OUT, G, RANKS, T = 3, 5, 8, 12, 6, (1, 2, 4), 4


def draw(*shape: int) -> Tensor:
    return (2 * torch.rand(*shape, dtype=torch.double) - 1).requires_grad_()


def make_theta(batch: int = B) -> Theta:
    ranks = sum(RANKS)
    return Theta(
        factors=Factors(
            draw(batch, T, D // T, ranks),
            draw(batch, T, ranks, OUT // T),
            draw(batch, T, T),
            draw(batch, T, T),
        ),
        bias=draw(batch, OUT),
        project=draw(batch, G, D),
        offset=draw(batch, G),
        anchors=draw(batch, len(RANKS), G),
        log_scale=draw(batch),
    )


def make_layer(dropout: float = 0.0) -> MoALinear:
    config = MoAConfig(ranks=RANKS, gate_dim=G, dropout=dropout)
    return MoALinear(nn.Linear(D, OUT).double(), config, torch.Generator().manual_seed(0))


def test_an_update_is_a_sum_of_kronecker_products():
    theta, x = make_theta(), draw(B, N, D)
    f = theta.factors
    y = update(x, f)
    for b in range(B):
        h = sum(
            torch.kron(torch.outer(f.u[b, t], f.v[b, t]), f.left[b, t] @ f.right[b, t])
            for t in range(T)
        )
        assert h.shape == (D, OUT)
        torch.testing.assert_close(y[b], x[b] @ h, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_an_update_with_gates():
    gates = draw(2, T, 3, 7)
    f = make_theta(2).factors

    def function(x, gates, left, right, u, v):
        return update(x, Factors(left, right, u, v), gates)

    inputs = (draw(2, 3, D), gates, f.left, f.right, f.u, f.v)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_terms():
    assert default_terms(768) == 64 and default_terms(192) == 16 and default_terms(11) == 1
    assert default_terms(96) == 8 and default_terms(384) == 32 and default_terms(50) == 2


def test_the_kronecker_adapter_beside_a_layer():
    base, generator = nn.Linear(D, OUT), torch.Generator().manual_seed(0)
    twin = copy.deepcopy(base)
    shared = SharedFactors(T, generator)
    adapter, x = KroneckerAdapter(base, shared, 2, generator), torch.randn(2, N, D)
    h = sum(
        torch.kron(torch.outer(shared.u[t], shared.v[t]), adapter.left[t] @ adapter.right[t])
        for t in range(T)
    )
    torch.testing.assert_close(adapter(x), twin(x) + x @ h)
    assert not base.weight.requires_grad
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"left", "right"}
    assert shared.u.abs().max() <= 0.01
    assert adapter.left.abs().max() <= math.sqrt(12 / (D // T + 2))
    with pytest.raises(UserError, match="terms=3 must divide the layers' widths, and 8 is one"):
        KroneckerAdapter(nn.Linear(8, 12), SharedFactors(3, generator), 1, generator)


@pytest.mark.parametrize("batch", [1, B])
def test_training_passes_have_noise_and_keep_the_noisy_probability(batch):
    """One expert per token, by noisy logits; its probability, noise included, is the gate."""
    layer, theta, x = make_layer().train(), make_theta(batch), draw(B, N, D)
    twin: Noise = copy.deepcopy(layer.noise)
    layer.theta = theta
    y = layer(x)
    clean = gate_logits(x, theta).flatten(0, 1)
    noise = twin.normal(clean)
    noisy = clean + noise / 3
    p = noisy.softmax(dim=1)
    for token in range(B * N):
        b, n = divmod(token, N)
        own = b if batch > 1 else 0
        best = int(noisy[token].argmax())
        f, start = theta.factors, sum(RANKS[:best])
        span = slice(start, start + RANKS[best])
        h = sum(
            torch.kron(
                torch.outer(f.u[own, t], f.v[own, t]),
                f.left[own, t][:, span] @ f.right[own, t][span],
            )
            for t in range(T)
        )
        expected = layer.base(x[b, n]) + p[token, best] * (x[b, n] @ h) + theta.bias[own]
        torch.testing.assert_close(y[b, n], expected, rtol=1e-12, atol=1e-12)
    routing = layer.last_routing
    assert routing is not None and routing.chosen is not None
    assert torch.equal(routing.chosen.sum(dim=1), torch.ones(B * N, dtype=torch.long))
    torch.testing.assert_close(routing.probabilities, clean.softmax(dim=1))


def test_the_scale_is_clamped_at_a_hundred():
    theta, x = make_theta(), draw(B, N, D)
    theta.log_scale = torch.full((B,), 9.0, dtype=torch.double)
    assert 50 < gate_logits(x, theta).abs().max() <= 100


def test_importance_and_load():
    """CV² of summed probabilities and of summed chances to be picked, unbiased variances."""
    layer, theta, x = make_layer().train(), make_theta(), draw(B, N, D)
    layer.theta = theta
    layer(x)
    routing = layer.last_routing
    assert routing is not None and routing.load is not None
    clean = gate_logits(x, theta).flatten(0, 1).softmax(dim=1)
    top = routing.gates.sum(dim=1).detach()  # the largest noisy probability
    clean = clean.detach()
    importance, load = [0.0] * 3, [0.0] * 3
    for token in range(B * N):
        for e in range(3):
            importance[e] += float(clean[token, e])
            z = float(clean[token, e] - top[token]) * 3
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def cv2(values):
        mean = sum(values) / 3
        return sum((v - mean) ** 2 for v in values) / 2 / (mean**2 + 1e-10)

    expected = (cv2(importance) + cv2(load)) / 2
    torch.testing.assert_close(
        layer.last_balance, torch.tensor(expected, dtype=torch.double), rtol=1e-10, atol=1e-12
    )
    one = torch.ones(4, 1, dtype=torch.double)
    assert balance_loss(one, one) == 0


@pytest.mark.parametrize("batch", [1, B])
def test_dropout_leaves_ranks_of_terms_out_and_keeps_the_mean(batch):
    layer, theta, x = make_layer(0.5).train(), make_theta(batch), draw(B, N, D)
    kept = layer._kept(theta.factors)
    assert kept.shape == (batch, T, 1, 7) and set(kept.unique().tolist()) == {0.0, 2.0}
    layer.theta = theta
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    draws = torch.stack([layer.train()._kept(theta.factors) for _ in range(200)])
    assert abs(draws.mean() - 1) < 0.05


def test_without_parameters_it_is_the_frozen_layer():
    layer, x = make_layer(), draw(B, N, D)
    assert torch.equal(layer(x), layer.base(x))
    assert layer.last_routing is None


def test_copies_leave_the_last_pass_out():
    method = make("moe2")
    method(images()).sum()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(method)))
    assert twin.layers[0].last_routing is None and twin.layers[0].theta is None
    x = images()
    assert torch.equal(method.eval()(x), twin.eval()(x))


def test_moa_is_moe2_with_one_set():
    """The same draws, the same noise, the same function."""
    moa = scatter(make("moa", dropout=0.0))
    moe2 = scatter(make("moe2", dropout=0.0, experts=1, smoothing=0.0, diversity=0.0))
    with torch.no_grad():
        for name, rows in moe2.outer.bank.rows.items():
            rows.copy_(moa.sets[0].rows[name])
        moe2.head.load_state_dict(moa.head.state_dict())
        for one, other in zip(moe2.layers, moa.layers, strict=True):
            one.noise.load_state_dict(other.noise.state_dict())
    x, labels = images(), torch.arange(4) % 3
    for mode in (True, False):
        expected, parts = moa.train(mode).loss(x, labels)
        got, own = moe2.train(mode).loss(x, labels)
        torch.testing.assert_close(own["classification"], parts["classification"])
        torch.testing.assert_close(got, expected)


def test_where_the_layers_go():
    for depth, every, where in (
        (3, 2, [0, 2]),
        (4, 2, [0, 2]),
        (4, 1, [0, 1, 2, 3]),
        (4, 3, [0, 3]),
    ):
        method = make("moe2", tiny_vit(depth=depth), every=every)
        found = [isinstance(block.attn.qkv, MoALinear) for block in method.backbone.blocks]
        assert [i for i, yes in enumerate(found) if yes] == where

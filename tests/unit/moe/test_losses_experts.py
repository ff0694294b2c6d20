"""Losses on weights and outputs of experts against loops."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_tools import close, given_by, loss_of, make_layer, make_loss, samples
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe import ExpertBank, LossInput
from dynmoe.moe.losses.diversity import gram_schmidt

EXPERTS = (1, 3, 5)


class RowBank(ExpertBank):
    """Each expert is a linear map of its own: weights [M, 3, 4] out of [M, 2, 4], biases [M, 3]."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(room, 2, 4, dtype=torch.double))
        self.outer = nn.Parameter(torch.randn(room, 3, 2, dtype=torch.double))
        self.bias = nn.Parameter(torch.randn(room, 3, dtype=torch.double))

    def forward(self, x, routing, gate_scale=1.0):
        return torch.einsum("nm,mno->no", routing.gates * gate_scale, self.expert_outputs(x))

    def expert_outputs(self, x):
        hidden = torch.einsum("nd,mhd->mnh", x, self.inner)
        return torch.einsum("mnh,moh->mno", hidden, self.outer) + self.bias.unsqueeze(1)

    def expert_rows(self):
        return [self.inner, self.outer, self.bias]

    def output_rows(self):
        return [self.outer, self.bias]

    def draw_experts(self, index, generator):
        raise AssertionError("not grown here")


def with_rows(experts: int) -> LossInput:
    """A pass of a layer whose bank is made of rows."""
    layer = make_layer("topk", experts)
    layer.bank = RowBank(5)
    return given_by(layer, samples())


def units_of(layer, expert: int) -> list[list[float]]:
    """Incoming weights of one expert's units."""
    return [
        w for w, e in zip(layer.bank.w_in.tolist(), layer.bank.segment.tolist(), strict=True)
        if e == expert
    ]  # fmt: skip


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("experts", EXPERTS)
def test_orthogonal_of_units_is_the_overlap_of_their_weights(experts, scattered):
    layer = make_layer("topk", experts)
    if scattered:
        layer.bank.segment.copy_(layer.bank.segment[torch.randperm(12)])
    total = 0.0
    for i, j in permutations(range(experts), 2):
        a, b = units_of(layer, i), units_of(layer, j)
        products = math.fsum(dot(u, v) ** 2 for u in a for v in b)
        total += products / math.fsum(dot(u, u) for u in a) / math.fsum(dot(v, v) for v in b)
    close(loss_of("orthogonal", layer, samples()), total)


def test_orthogonal_of_one_unit_each_is_the_squared_cosine_of_equation_7():
    layer = make_layer("topk", 5)
    layer.bank.segment.copy_(torch.tensor([0, 1, 2, 3, 4] + [4] * 7))
    with torch.no_grad():
        layer.bank.w_in[5:] = 0.0
    w = layer.bank.w_in.detach()[:5].numpy()
    w = w / np.linalg.norm(w, axis=1, keepdims=True)
    cosines = w @ w.T
    close(
        loss_of("orthogonal", layer, samples()), (cosines**2).sum() - (np.diag(cosines) ** 2).sum()
    )


@pytest.mark.parametrize("experts", EXPERTS)
def test_orthogonal_of_rows_is_equation_7(experts):
    inputs = with_rows(experts)
    rows = [
        np.concatenate([p[e].detach().numpy().ravel() for p in inputs.bank.expert_rows()])
        for e in range(experts)
    ]
    cosines = [
        (a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2 for a, b in permutations(rows, 2)
    ]
    close(make_loss("orthogonal")(inputs), math.fsum(cosines))


def test_orthogonal_of_an_expert_without_weights_is_finite():
    layer = make_layer("topk")
    with torch.no_grad():
        layer.bank.w_in[layer.bank.segment == 1] = 0.0
    loss = loss_of("orthogonal", layer, samples())
    loss.backward()
    assert loss.isfinite() and layer.bank.w_in.grad.isfinite().all()


def inside(y: Tensor, basis: Tensor) -> float:
    """|P y|^2 / |y|^2 with P the projection on the rows of `basis`, by least squares."""
    y, basis = y.numpy(), basis.numpy()
    coefficients = np.linalg.lstsq(basis.T, y, rcond=None)[0]
    return float(((basis.T @ coefficients) ** 2).sum() / (y**2).sum())


@pytest.mark.parametrize("experts", EXPERTS)
def test_gram_schmidt_is_the_share_within_the_span_of_the_others(experts):
    layer, x = make_layer("topk", experts), samples()
    outputs, total = layer.bank.expert_outputs(x).detach(), 0.0
    for n in range(len(x)):
        for e in range(1, experts):
            total += inside(outputs[e, n], outputs[:e, n])
    expected = total / len(x) / (experts - 1) if experts > 1 else 0.0
    torch.testing.assert_close(
        loss_of("gram-schmidt", layer, x).item(), expected, rtol=1e-10, atol=1e-10
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 6),
    dim=st.integers(1, 7),
    log_scale=st.floats(-6, 6),
    single=st.booleans(),
)
def test_gram_schmidt_gives_orthonormal_outputs_or_0(seed, experts, dim, log_scale, single):
    torch.manual_seed(seed)
    dtype = torch.float32 if single else torch.double
    y = 10**log_scale * torch.randn(6, 3, dim, dtype=torch.double)
    active = torch.arange(6) < experts
    if experts > 2:
        y[2] = y[0] - 2 * y[1]  # in the span of two others
    q = gram_schmidt(y.to(dtype), active)
    assert q.shape == y.shape and not q[experts:].any()
    products = torch.einsum("ind,jnd->nij", q, q).double()
    independent = [e for e in range(experts) if e != 2][:dim]
    expected = torch.zeros(6, 6, dtype=torch.double)
    expected[independent, independent] = 1.0
    tolerance = 1e-5 if single else 1e-12
    torch.testing.assert_close(products, expected.expand(3, 6, 6), rtol=0, atol=tolerance)
    part = torch.einsum("end,nd->en", q, y[0].to(dtype))
    rebuilt = torch.einsum("en,end->nd", part, q).double()
    torch.testing.assert_close(rebuilt, y[0], rtol=tolerance, atol=tolerance * 10**log_scale)


def test_gram_schmidt_of_nearly_equal_outputs_stays_orthogonal_in_float32():
    y = torch.randn(1, 50, 8).repeat(3, 1, 1) + 1e-3 * torch.randn(3, 50, 8)
    q = gram_schmidt(y, torch.ones(3, dtype=torch.bool))
    products = torch.einsum("ind,jnd->nij", q, q)
    torch.testing.assert_close(products, torch.eye(3).expand(50, 3, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("values", "expected"), [("equal", 1.0), ("orthogonal", 0.0)])
def test_gram_schmidt_loss_at_its_ends(values, expected):
    inputs = with_rows(3)
    with torch.no_grad():
        inputs.bank.inner.zero_()
        inputs.bank.bias[:] = torch.ones(3) if values == "equal" else torch.eye(3)[[0, 1, 2, 0, 1]]
    loss = make_loss("gram-schmidt")(inputs)
    close(loss, expected)
    loss.backward()
    assert inputs.bank.bias.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("experts", EXPERTS)
def test_distillation_is_the_mean_divergence_of_two_experts(experts, temperature):
    layer, x = make_layer("topk", experts), samples()
    outputs, total = layer.bank.expert_outputs(x).tolist(), 0.0
    for n in range(len(x)):
        for i, j in permutations(range(experts), 2):
            p, q = (softmax([v / temperature for v in outputs[e][n]]) for e in (i, j))
            total += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = total / len(x) / (experts * (experts - 1)) if experts > 1 else 0.0
    close(loss_of("distillation", layer, x, temperature=temperature), expected)


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(map(math.exp, row))
    return [math.exp(v) / total for v in row]


def test_distillation_draws_outputs_together():
    inputs = with_rows(3)
    loss, optimizer = make_loss("distillation"), torch.optim.SGD(inputs.bank.parameters(), 0.3)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(inputs)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.2 * values[0]


def test_a_detached_teacher_gets_no_gradient():
    """With two experts each is teacher once, so the gradient is that of the students alone."""
    inputs = with_rows(2)
    make_loss("distillation", detach_target=True)(inputs).backward()
    log_p = inputs.bank.expert_outputs(inputs.x)[:2].log_softmax(dim=2)
    students = -0.5 * (log_p.flip(0).exp().detach() * log_p).sum(dim=2).mean(dim=1).sum()
    (expected,) = torch.autograd.grad(students, inputs.bank.bias)
    torch.testing.assert_close(inputs.bank.bias.grad, expected, rtol=1e-12, atol=1e-12)
    whole = torch.autograd.grad(make_loss("distillation")(inputs), inputs.bank.bias)[0]
    assert not torch.allclose(whole, expected)


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("experts", EXPERTS)
def test_parseval_of_units_is_each_experts_gap_to_the_identity(experts, scale):
    layer, total = make_layer("topk", experts), 0.0
    layer.bank.segment.copy_(layer.bank.segment[torch.randperm(12)])
    for e in range(experts):
        w = np.array(units_of(layer, e))
        total += ((w @ w.T - scale * np.eye(len(w))) ** 2).sum()
    close(loss_of("parseval", layer, samples(), scale=scale), total / experts)


@pytest.mark.parametrize("experts", EXPERTS)
def test_parseval_of_rows_leaves_the_output_layer_alone(experts):
    inputs, total = with_rows(experts), 0.0
    for w in inputs.bank.inner.detach().numpy()[:experts]:
        total += ((w @ w.T - np.eye(2)) ** 2).sum()
    loss = make_loss("parseval")(inputs)
    close(loss, total / experts)
    loss.backward()
    assert inputs.bank.outer.grad is None and not inputs.bank.inner.grad[experts:].any()


def test_parseval_of_a_bank_without_matrices_is_refused():
    inputs = with_rows(3)
    inputs.bank.expert_rows = lambda: [inputs.bank.bias]
    inputs.bank.name = "affine"
    with pytest.raises(UserError, match="parseval loss: bank 'affine' has no weight matrices"):
        make_loss("parseval")(inputs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("distillation", {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ("parseval", {"scale": -1.0}, "scale=-1.0 must be above 0"),
    ],
)
def test_bad_options_of_expert_losses_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        make_loss(name, **options)

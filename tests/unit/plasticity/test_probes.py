"""A probe records what the network did and leaves no trace in it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import NumericError
from dynmoe.moe import MoELayer
from dynmoe.moe.model import undisturbed
from dynmoe.moe.routers.topk import TopKRouter
from dynmoe.plasticity.probes import copy_parameters, last_linear, take_probe


class Noisy(nn.Module):
    """Changes a buffer and draws random numbers in every forward pass, in eval mode too."""

    calls: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return x + 1e-3 * torch.rand_like(x)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def mixed_case() -> tuple[nn.Module, Tensor, Tensor]:
    """All that can be disturbed: BatchNorm, dropout, noise, MoE, grads set, flags mixed."""
    moe = MoELayer(8, 8, 12, num_experts=2, max_experts=4)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), Noisy(), nn.Dropout(), moe, nn.Linear(8, 3)
    )
    model(torch.randn(10, 6)).sum().backward()
    model[2].eval()
    return model, torch.randn(32, 6), torch.randint(0, 3, (32,))


def test_model_is_left_as_it_was():
    model, x, y = mixed_case()
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}
    flags = [m.training for m in model.modules()]
    routing, rng = model[5].last_routing, torch.get_rng_state()
    take_probe(model, x, y)
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0] and torch.equal(p.grad, grads[name][1]), name
    for name, b in model.named_buffers():
        assert b is buffers[name][0] and torch.equal(b, buffers[name][1]), name
    assert [m.training for m in model.modules()] == flags
    assert model[5].last_routing is routing
    assert torch.equal(torch.get_rng_state(), rng)
    assert hook_count(model) == 0


def test_failure_in_forward_leaves_no_hooks_nor_eval_mode():
    model, x, y = mixed_case()
    flags = [m.training for m in model.modules()]
    calls = model[3].calls.clone()
    with pytest.raises(RuntimeError):
        take_probe(model, x[:, :4], y)  # fails in the first layer
    with pytest.raises((RuntimeError, IndexError)):
        take_probe(model, x, y + 99)  # fails in the loss, after the forward pass
    assert hook_count(model) == 0
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model[3].calls, calls)


def test_pending_graph_survives_a_probe():
    """A probe between forward and backward must not invalidate what autograd saved."""
    results = []
    for probed in (True, False):
        torch.manual_seed(3)
        model, x, y = mixed_case()
        model.train()
        loss = F.cross_entropy(model(x), y)
        if probed:
            take_probe(model, x, y)
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_loss_and_logits_equal_a_plain_backward(case):
    model, x, y = case
    probe = take_probe(model, x, y)
    twin = copy.deepcopy(model).eval()
    logits = twin(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    torch.testing.assert_close(probe.logits, logits.detach())
    assert probe.loss == pytest.approx(loss.item(), rel=1e-6)
    assert probe.gradients.keys() == {n for n, _ in model.named_parameters()}
    for name, p in twin.named_parameters():
        got = probe.gradients[name]
        torch.testing.assert_close(got, p.grad[: len(got)])
        torch.testing.assert_close(probe.parameters[name], p.detach()[: len(got)])


def regression(x: Tensor) -> tuple[nn.Module, Tensor]:
    """A critic with an MoE layer as its head, [N, 1], and what it should say."""
    head = MoELayer(7, 1, 12, num_experts=2, max_experts=3)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), head)
    return model, torch.randn(len(x), 1)


def test_another_loss_gives_its_own_value_and_gradients():
    x = torch.randn(9, 4)
    model, target = regression(x)
    probe = take_probe(model, x, target, classifier=model[2], loss=F.mse_loss)
    twin = copy.deepcopy(model)
    loss = (twin(x) - target).square().mean()
    loss.backward()
    assert probe.loss == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(probe.logits, twin(x).detach())
    torch.testing.assert_close(probe.features, twin[1](twin[0](x)).detach())
    for name, p in twin.named_parameters():
        got = probe.gradients[name]
        torch.testing.assert_close(got, p.grad[: len(got)])
    torch.testing.assert_close(probe.experts["2"].weight_in_grad, twin[2].bank.w_in.grad)


def test_a_loss_sees_logits_and_labels_as_they_are():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    seen = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits, labels))
        return logits.sum() * 0 + 2.5

    labels = torch.randn(6, 2)
    probe = take_probe(model, x, labels, loss=loss)
    assert probe.loss == 2.5 and len(seen) == 1 and seen[0][1] is labels
    torch.testing.assert_close(seen[0][0], model(x))
    assert not any(g.any() for g in probe.gradients.values())
    flat = nn.CrossEntropyLoss(label_smoothing=0.2)
    y = torch.randint(0, 3, (6,))
    assert take_probe(model, x, y, loss=flat).loss == pytest.approx(flat(model(x), y).item())
    assert take_probe(model, x, y).loss == pytest.approx(F.cross_entropy(model(x), y).item())


def test_another_loss_that_is_not_finite_is_an_error():
    x = torch.randn(9, 4)
    model, target = regression(x)
    with pytest.raises(NumericError, match="the loss on the probe batch is inf"):
        take_probe(model, x, target + math.inf, classifier=model[2], loss=F.mse_loss)
    assert hook_count(model) == 0


def test_works_inside_no_grad(case):
    model, x, y = case
    with torch.no_grad():
        assert take_probe(model, x, y).gradients


def test_activations_and_features_of_an_mlp():
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))
    x, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    probe = take_probe(model, x, y)
    h1 = model[0](x).clamp_min(0)
    h2 = F.gelu(model[2](h1))
    assert list(probe.activations) == ["1", "3"]
    torch.testing.assert_close(probe.activations["1"], h1.detach())
    torch.testing.assert_close(probe.activations["3"], h2.detach())
    torch.testing.assert_close(probe.features, h2.detach())
    other = take_probe(model, x, y, classifier=model[2])
    torch.testing.assert_close(other.features, h1.detach())


class Residual(nn.Module):
    """One activation module used twice, its output overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        h = h.mul_(-1.0)
        return self.head(self.act(self.b(h)))


def test_shared_and_inplace_activation():
    model, x = Residual(), torch.randn(9, 4)
    probe = take_probe(model, x, torch.zeros(9, dtype=torch.long))
    first = F.gelu(model.a(x))
    assert list(probe.activations) == ["act", "act#2"]
    torch.testing.assert_close(probe.activations["act"], first.detach())
    torch.testing.assert_close(probe.activations["act#2"], F.gelu(model.b(-first)).detach())


def test_frozen_and_unused_parameters_have_no_gradient():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model.spare = nn.Parameter(torch.ones(2))
    probe = take_probe(model, torch.randn(5, 4), torch.zeros(5).long(), classifier=model[2])
    assert probe.gradients.keys() == {"2.weight", "2.bias"}
    assert "spare" in probe.parameters


def test_moe_layer_is_read_from_its_bank_once(moe_case):
    model, x, y = moe_case
    layer = model[2]
    probe = take_probe(model, x, y)
    assert list(probe.activations) == ["1", "2.hidden"]  # the bank's own ReLU is not there again
    entering = model[1](model[0](x)).detach()
    expert = probe.experts["2"]
    bank = layer.bank
    torch.testing.assert_close(expert.hidden, F.relu(entering @ bank.w_in.T + bank.b_in).detach())
    torch.testing.assert_close(expert.gates, layer.router(entering).gates[:, :3].detach())
    torch.testing.assert_close(expert.gates.sum(dim=1), torch.ones(len(x)))
    assert expert.created.tolist() == [0, 0, 1]
    assert expert.segment.tolist() == [0] * 7 + [1] * 7 + [2] * 6
    assert expert.weight_in_grad is not None and expert.weight_in_grad.shape == bank.w_in.shape
    assert expert.weight_out_grad is not None and expert.weight_out_grad.shape == bank.w_out.shape
    torch.testing.assert_close(probe.features, layer(entering).detach())


@pytest.mark.parametrize("bank", ["pool", "bottleneck"])
def test_a_forward_pass_with_autocast_of_its_own(bank):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = registry.get("bank", bank).Config()
            self.first, self.moe = nn.Linear(4, 6), MoELayer(6, 6, 24, bank=options)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(self.moe(F.relu(self.first(x))))

    model, x = Net(), torch.randn(10, 4)
    probe = take_probe(model, x, torch.zeros(10).long())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        entering = F.relu(model.first(x))
    expected = model.moe.bank.hidden(entering.float())
    torch.testing.assert_close(probe.experts["moe"].hidden, expected.detach())


def test_rows_of_experts_to_come_are_left_out(moe_case):
    model, x, y = moe_case
    probe = take_probe(model, x, y, initial=copy_parameters(model))
    assert probe.initial is not None
    for name in ("2.router.weight", "2.bank.b_out"):
        shapes = {len(t[name]) for t in (probe.gradients, probe.parameters, probe.initial)}
        assert shapes == {3}, name
        assert bool((probe.gradients[name] != 0).any(dim=1).all()), name


def test_tokens_and_sparse_routing():
    """[N, T, D] inputs are routed token by token; top-k gates are zero outside the chosen."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            router = TopKRouter.Config(k=2)
            self.moe = MoELayer(6, 6, 12, num_experts=4, max_experts=5, router=router)
            self.act, self.head = nn.GELU(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.moe(x))).mean(dim=1)

    x = torch.randn(10, 5, 6)
    probe = take_probe(Net(), x, torch.zeros(10).long())
    expert = probe.experts["moe"]
    assert expert.gates.shape == (50, 4) and expert.hidden.shape == (50, 12)
    assert (expert.gates > 0).sum(dim=1).tolist() == [2] * 50
    assert probe.activations["act"].shape == (10, 5, 6)
    assert probe.features.shape == (50, 6)


def test_probe_holds_no_graph(moe_case):
    model, x, y = moe_case
    probe = take_probe(model, x, y)
    expert = probe.experts["2"]
    tensors = [*probe.activations.values(), *probe.gradients.values(), *probe.parameters.values()]
    tensors += [probe.features, probe.logits, expert.gates, expert.hidden, expert.weight_in]
    assert not any(t.requires_grad for t in tensors)


def test_bad_input_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(5, 4), torch.zeros(5).long()
    with pytest.raises(ValueError, match="empty"):
        take_probe(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="classifier="):
        take_probe(nn.Sequential(nn.Tanh()), x, y)
    with pytest.raises(ValueError, match="not called"):
        take_probe(model, x, y, classifier=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="logits"):
        take_probe(nn.Sequential(model, nn.Flatten(0)), x, y)
    with pytest.raises(ValueError, match=r"'2.bias' has shape \(3,\)"):
        take_probe(model, x, y, initial={"2.bias": torch.zeros(3)})
    with pytest.raises(NumericError, match="nan"):
        take_probe(model, x * float("nan"), y)
    assert hook_count(model) == 0


def test_classifier_is_never_a_part_of_an_moe_layer():
    moe = MoELayer(4, 4, 8)
    moe.router.projection = nn.Linear(4, 4)  # as a router with its own projection would have
    head = nn.Linear(4, 2)
    assert last_linear(nn.ModuleDict({"head": head, "moe": moe})) is head


def test_copies_at_the_start_do_not_follow_training():
    model = nn.Linear(3, 2)
    kept = copy_parameters(model)
    with torch.no_grad():
        model.weight += 1
    torch.testing.assert_close(model.weight - kept["weight"], torch.ones(2, 3))


def test_undisturbed_runs_in_eval_mode():
    model, _, _ = mixed_case()
    with undisturbed(model):
        assert not any(m.training for m in model.modules())

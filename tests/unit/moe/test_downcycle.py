"""Layers turned back into dense MLPs, and layers without their idle experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import AuxLoss, ExpertBank, MoELayer, Router, Routing, routing_inputs
from dynmoe.moe.diagnostics import function_change
from dynmoe.moe.downcycle import distil, merge
from dynmoe.moe.losses.balance import SwitchLoss
from dynmoe.moe.prune import prune, without_experts
from dynmoe.moe.upcycle import upcycle
from dynmoe.registry import PartConfig


def make_layer(router: str = "softmax", experts: int = 3, **options) -> MoELayer:
    """A float64 layer 5 -> 4 with scattered units of unequal sizes."""
    options = {"max_experts": experts + 2, "activation": "gelu"} | options
    config = registry.get("router", router).Config()
    layer = MoELayer(5, 4, 12, num_experts=experts, router=config, **options).double()
    owner = torch.arange(12).remainder(experts + 1).clamp_max(experts - 1)
    layer.bank.segment.copy_(owner[torch.randperm(12)])
    return layer


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.double)


def fix_gates(layer: MoELayer, *logits: float) -> None:
    """Gates that do not depend on the input: a softmax of these logits."""
    with torch.no_grad():
        layer.router.weight.zero_()
    layer.router.logit_shift[: len(logits)] = torch.tensor(logits)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
def test_merging_is_exact_where_gates_are_constant(gate_scale, shared, device):
    layer = make_layer(gate_scale=gate_scale, shared_hidden=shared).to(device)
    fix_gates(layer, 1.0, -0.5, 0.2)
    x = samples(2, 6).to(device)
    mlp = merge(layer, x)
    torch.testing.assert_close(mlp(x), layer(x), rtol=1e-12, atol=1e-12)
    assert [type(part) for part in mlp] == [nn.Linear, nn.GELU, nn.Linear]
    assert mlp[0].out_features == 12 + shared
    assert function_change(layer, merge(layer), x).relative > 1e-2  # gates are not uniform
    fix_gates(layer, 0.0, 0.0, 0.0)
    torch.testing.assert_close(merge(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ["softmax", "topk"])
def test_units_are_weighted_by_their_owners_mean_gate(router):
    layer, x = make_layer(router), samples(40)
    layer(x)
    gates = layer.last_routing.gates * (2 if router == "topk" else 3)
    hidden = nn.functional.gelu(x @ layer.bank.w_in.T + layer.bank.b_in)
    expected = torch.zeros(40, 4, dtype=torch.double)
    for expert in range(3):
        mean = gates[:, expert].mean()
        for unit in (layer.bank.segment == expert).nonzero().flatten().tolist():
            expected += mean * hidden[:, unit : unit + 1] * layer.bank.w_out[:, unit]
        expected += mean * layer.bank.b_out[expert]
    torch.testing.assert_close(merge(layer, x)(x), expected, rtol=1e-12, atol=1e-12)
    with routing_inputs(layer, mask=torch.arange(40) < 30):
        masked = merge(layer, x)
    torch.testing.assert_close(masked[2].weight, merge(layer, x[:30])[2].weight)


def test_slots_mix_by_unscaled_weights():
    """Soft-MoE's layers leave the gate scale out, so merging must, too."""
    layer, x = make_layer("slots"), samples(10)
    layer.eval()(x)
    gates = layer.last_routing.gates.mean(dim=0)
    expected = layer.bank.w_out * gates[layer.bank.segment]
    torch.testing.assert_close(merge(layer, x)[2].weight, expected, rtol=1e-12, atol=1e-12)


def test_merging_undoes_upcycling():
    mlp, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double(), samples(9)
    for how in ("split", "copy"):
        back = merge(upcycle(mlp, 4, how=how), x)
        torch.testing.assert_close(back(x), mlp(x), rtol=1e-12, atol=1e-12)


def test_merging_keeps_dtype_and_mode_and_touches_nothing():
    layer = make_layer().float().eval()
    before, x = copy.deepcopy(layer.state_dict()), samples(7).float()
    mlp = merge(layer, x)
    assert not mlp.training and {p.dtype for p in mlp.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.last_routing is None


class LoudRouter(Router):
    """Gates with a scale of their own; registered nowhere."""

    name = "loud"
    normalised = False

    def route(self, inputs):
        logits = self.mask(inputs.x @ self.weight.T)
        gates = logits.exp()
        return Routing(gates=gates, logits=logits, probabilities=gates, active=self.active)


class Biases(ExpertBank):
    """A bank without hidden units: each expert is one output row."""

    name = "biases"

    def __init__(self, config, dim_in, dim_out, hidden, num_experts, max_experts, *_):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(max_experts, dim_out))

    def forward(self, x, routing, gate_scale=1.0):
        return (routing.gates * gate_scale) @ self.rows

    def expert_outputs(self, x):
        return self.rows.unsqueeze(1).expand(-1, len(x), -1)

    def expert_rows(self):
        return [self.rows]

    def output_rows(self):
        return [self.rows]

    def draw_experts(self, index, generator):
        self.rows[index] = 0.0


class BiasesConfig(PartConfig):
    part = Biases


def test_what_cannot_be_merged():
    loud = make_layer()
    loud.router = LoudRouter(5, 3, 5, torch.Generator()).double()
    with pytest.raises(UserError, match="router 'loud' have a scale of their own; give x"):
        merge(loud)
    with torch.no_grad():
        loud.router.weight.zero_()
    x = samples(6)
    torch.testing.assert_close(merge(loud, x)(x), loud(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="bank 'biases' has no dense counterpart"):
        merge(MoELayer(5, 4, 9, num_experts=3, bank=BiasesConfig()))


# ---------------------------------------------------------------- distillation


def test_distilling_gets_closer_than_merging():
    layer = make_layer("softmax", 3)
    with torch.no_grad():
        layer.router.weight.mul_(5.0)
    batches = [samples(64) for _ in range(4)]
    before = copy.deepcopy(layer.state_dict())
    mlp, curve = distil(layer, batches, 150, 1e-2, torch.Generator().manual_seed(1))
    assert len(curve) == 150 and sum(curve[-10:]) < 0.5 * sum(curve[:10])
    fresh = samples(200)
    assert function_change(layer, mlp, fresh).relative < (
        0.8 * function_change(layer, merge(layer, batches[0]), fresh).relative
    )
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    _, again = distil(layer, batches, 150, 1e-2, torch.Generator().manual_seed(1))
    assert again == curve


def test_the_curve_starts_at_the_merged_mlps_error():
    layer, x = make_layer("topk"), samples(30)
    mlp, curve = distil(layer, [x], 1)
    error = (merge(layer, x)(x) - layer(x)).square().mean()
    assert curve == [pytest.approx(error.item())]
    assert not torch.equal(mlp[0].weight, layer.bank.w_in)  # one step was taken
    assert distil(layer, [x], 0)[1] == []


def test_bad_options_of_distilling():
    with pytest.raises(UserError, match="0 batches, steps=5 and lr=0.001 must be at least 1"):
        distil(make_layer(), [], 5)
    with pytest.raises(UserError, match="steps=-1"):
        distil(make_layer(), [samples(3)], -1)
    with pytest.raises(UserError, match="lr=0"):
        distil(make_layer(), [samples(3)], 1, lr=0)


# ---------------------------------------------------------------- pruning


def mute(layer: MoELayer, expert: int) -> None:
    """Take the expert's gate away, to below rounding."""
    layer.router.logit_shift[expert] = -200.0


@pytest.mark.parametrize("bank", ["pool", "rows"])
@pytest.mark.parametrize("gate_scale", ["experts", "one"])
@pytest.mark.parametrize("router", ["softmax", "cosine", "topk"])
def test_removing_an_unused_expert_keeps_the_function(router, gate_scale, bank, device):
    if bank == "pool":
        layer = make_layer(router, 4, gate_scale=gate_scale)
    else:
        config = registry.get("router", router).Config()
        layer = MoELayer(5, 4, 9, num_experts=4, router=config, bank=BiasesConfig(),
                         gate_scale=gate_scale).double()  # fmt: skip
    layer.created[:4] = torch.tensor([0, 1, 2, 3])
    mute(layer, 1)
    layer, x = layer.to(device), samples(3, 20).to(device)
    before = copy.deepcopy(layer.state_dict())
    pruned = prune(layer, [x[:2], x[2:]], 0.001)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    smaller = pruned.layer
    assert pruned.kept == [0, 2, 3] and smaller.num_experts == 3
    torch.testing.assert_close(smaller(x), layer(x), rtol=1e-12, atol=1e-12)
    assert pruned.change.largest < 1e-12
    assert smaller.created[:3].tolist() == [0, 2, 3] and smaller.max_experts == layer.max_experts
    layer(x)
    shares = layer.last_routing.gates[:, :4]
    torch.testing.assert_close(pruned.load, shares.mean(dim=0).cpu().detach())
    if bank == "pool":
        sizes = layer.bank.hidden_sizes()
        assert smaller.bank.hidden_sizes() == [sizes[0], sizes[2], sizes[3]]
        assert smaller.bank.w_in.shape == (12 - sizes[1], 5)


@pytest.mark.parametrize("router", ["softmax", "topk"])
def test_rows_and_units_of_the_kept_move_together(router):
    """By hand: gates are those of a router without the others' rows."""
    layer = make_layer(router, 4, gate_scale="one")
    layer.router.logit_shift[:4] = torch.tensor([0.1, -0.2, 0.3, 0.4])
    x = samples(20)
    smaller = without_experts(layer, [3, 1])
    logits = x @ layer.router.weight[[3, 1]].T + torch.tensor([0.4, -0.2])
    outputs = layer.bank.expert_outputs(x)[[3, 1]]
    expected = torch.einsum("nk,kno->no", logits.softmax(dim=1), outputs)
    torch.testing.assert_close(smaller(x), expected, rtol=1e-6, atol=1e-7)  # shifts are float32
    assert smaller.router.active.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("router", ["softmax", "topk"])
@pytest.mark.parametrize("name", registry.names("bank"))
def test_every_bank_can_be_pruned(name, router):
    kinds = {"bank": name, "router": router}
    parts = {kind: registry.get(kind, part).Config() for kind, part in kinds.items()}
    layer = MoELayer(4, 4, 12, num_experts=4, max_experts=5, **parts).double()
    with torch.no_grad():
        for parameter in layer.bank.parameters():
            parameter.normal_()  # some banks start silent
    mute(layer, 2)
    images = layer.bank.per_sample and layer.bank.channel_axis == 1
    x = torch.randn(6, 4, 3, 3).double() if images else torch.randn(6, 7, 4).double()
    pruned = prune(layer, [x], 1e-6)
    assert pruned.kept == [0, 1, 3]
    torch.testing.assert_close(pruned.layer(x), layer(x), rtol=1e-11, atol=1e-11)
    assert pruned.change.largest < 1e-11 and layer(x).abs().max() > 0.1


@pytest.mark.parametrize("name", registry.names("router"))
def test_every_router_can_be_pruned(name):
    """Rows of whatever kind follow: the kept experts' parameters are theirs still."""
    router = registry.get("router", name)
    layer = MoELayer(5, 4, 12, num_experts=4, max_experts=6, router=router.Config()).double()
    with routing_inputs(layer, context=torch.arange(24) % 4):
        x = samples(24)
        smaller = without_experts(layer, [1, 3])
        y = copy.deepcopy(smaller)(x)  # some routers learn as they route
        pruned = prune(layer, [x], 0.01)
    assert y.isfinite().all() and y.shape == (24, 4) and smaller.num_experts == 2
    for new, old in zip(smaller.router.expert_rows(), layer.router.expert_rows(), strict=True):
        assert torch.equal(new[:2], old[[1, 3]])
    assert pruned.layer.num_experts == len(pruned.kept) > 0
    assert pruned.load.sum().item() == pytest.approx(1)


def test_the_report_tells_what_was_lost():
    layer, x = make_layer("softmax", 3), samples(100)
    loads = prune(layer, [x], 0.0).load.tolist()
    least = min(loads)
    pruned = prune(layer, [x], least + 1e-9)
    assert len(pruned.kept) == 2 and loads.index(least) not in pruned.kept
    assert pruned.change == function_change(layer, pruned.layer, x)
    assert 0.01 < pruned.change.relative < 2
    nothing = prune(layer, [x], 0.0)
    assert nothing.kept == [0, 1, 2] and nothing.change.largest == 0


def test_the_last_expert_stays():
    layer, x = make_layer("softmax", 3), samples(50)
    pruned = prune(layer, [x], 1.0)
    assert pruned.kept == [int(pruned.load.argmax())]
    assert pruned.layer.num_experts == 1 and pruned.layer(x).isfinite().all()
    assert prune(pruned.layer, [x], 1.0).kept == [0]


@pytest.mark.parametrize("router", ["softmax", "cosine", "topk"])
def test_pruned_layers_learn_grow_and_are_saved(router):
    layer, x = make_layer(router, 4, losses=(SwitchLoss.Config(),)), samples(40)
    layer(x).sum().backward()
    mute(layer, 2)
    smaller = prune(layer, [x], 0.01).layer
    assert all(p.grad is None or p.shape == p.grad.shape for p in smaller.parameters())
    optimizer = torch.optim.Adam(smaller.parameters(), 0.01)
    controller = GrowthController(smaller, optimizer, granularity=2)
    losses = []
    for step in range(8):
        if step == 4:
            controller.grow(step, (x, None))
        optimizer.zero_grad()
        loss = (smaller(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[0] and losses[7] < losses[4] and smaller.num_experts == 5
    twin = copy.deepcopy(smaller)
    twin.load_state_dict(smaller.state_dict())
    assert torch.equal(twin.eval()(x), smaller.eval()(x))


class CountingLoss(AuxLoss):
    """Keeps a count per expert; registered nowhere."""

    name = "counting"

    def __init__(self, config, max_experts):
        super().__init__(config, max_experts)
        self.register_buffer("counts", torch.arange(float(max_experts)))

    def forward(self, inputs):
        return inputs.x.new_zeros(())


def test_state_of_losses_follows_the_experts():
    layer = make_layer("softmax", 4)
    layer.losses.append(CountingLoss(CountingLoss.Config(), 6))
    smaller = without_experts(layer, [3, 1])
    assert smaller.losses[0].counts[:2].tolist() == [3, 1]
    assert layer.losses[0].counts.tolist() == [0, 1, 2, 3, 4, 5]


def test_padding_counts_for_no_load():
    layer, x = make_layer("softmax", 3), samples(30)
    with routing_inputs(layer, mask=torch.arange(30) < 20):
        masked = prune(layer, [x], 0.0).load
    torch.testing.assert_close(masked, prune(layer, [x[:20]], 0.0).load)


def test_bad_options_of_pruning():
    with pytest.raises(UserError, match="0 batches and threshold=0.1"):
        prune(make_layer(), [], 0.1)
    for threshold in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"threshold={threshold} must"):
            prune(make_layer(), [samples(3)], threshold)

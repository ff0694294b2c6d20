"""Pruned layers, saved and loaded into new ones: every router, every bank."""

from __future__ import annotations

import io

import pytest
import torch
from router_cases import VARIANTS
from torch import Tensor

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController
from dynmoe.moe import MoELayer, UnitBank, finish_step
from dynmoe.moe.losses.balance import GlobalBalanceLoss
from dynmoe.moe.prune import without_experts
from dynmoe.moe.routers.fixed import HashRouter
from dynmoe.moe.routers.hierarchical import HierarchicalRouter
from dynmoe.registry import PartConfig

DIM, EXPERTS, ROOM, HIDDEN = 8, 4, 5, 12
KEPT = [3, 0, 2]


def router_config(name: str) -> PartConfig:
    """Of a router, or of one of its variants."""
    name, options = VARIANTS.get(name, (name, {}))
    return registry.get("router", name).Config(**options)


def make_layer(router: PartConfig, bank: str, experts: int, hidden: int, seed: int) -> MoELayer:
    return MoELayer(
        DIM, DIM, hidden, num_experts=experts, max_experts=ROOM, router=router,
        bank=registry.get("bank", bank).Config(),
        losses=[GlobalBalanceLoss.Config()],
        generator=torch.Generator().manual_seed(seed),
    ).double()  # fmt: skip


def used_layer(router: PartConfig, bank: str = "pool") -> MoELayer:
    """A layer whose every weight and buffer has been used: nothing in it is at its start."""
    torch.manual_seed(0)
    layer = make_layer(router, bank, EXPERTS, HIDDEN, seed=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.router.logit_shift[:EXPERTS] = torch.randn(EXPERTS)
        layer.router.selection_bias[:EXPERTS] = torch.randn(EXPERTS)
    layer.created[:EXPERTS] = torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        layer(inputs(layer), context=contexts(layer))
    finish_step(layer)
    return layer


def inputs(layer: MoELayer) -> Tensor:
    images = layer.bank.per_sample and layer.bank.channel_axis == 1
    return torch.randn(6, DIM, 3, 3).double() if images else torch.randn(6, 4, DIM).double()


def contexts(layer: MoELayer) -> Tensor:
    return torch.arange(6) % 5 if layer.bank.per_sample else torch.arange(24).view(6, 4) % 5


def fresh(pruned: MoELayer, router: PartConfig, bank: str) -> MoELayer:
    """A new layer of as many experts and units, into which a saved state is loaded."""
    units = pruned.bank.segment.numel() if isinstance(pruned.bank, UnitBank) else 0
    hidden = units or HIDDEN // EXPERTS * len(KEPT)  # networks are as wide as before
    other = make_layer(router, bank, len(KEPT), hidden, seed=2)
    file = io.BytesIO()
    torch.save(pruned.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


CASES = [
    *[(router, "pool") for router in (*registry.names("router"), *VARIANTS)],
    *[(router, bank) for bank in registry.names("bank") for router in ("topk", "cosine")],
]


@pytest.mark.parametrize(("router", "bank"), CASES)
def test_a_saved_pruned_layer_is_loaded_as_it_was(router, bank):
    config = router_config(router)
    pruned = without_experts(used_layer(config, bank), KEPT)
    other, x = fresh(pruned, config, bank), inputs(pruned)
    for training in (False, True):
        pruned.train(training), other.train(training)
        y, again = (layer(x, context=contexts(layer)) for layer in (pruned, other))
        torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
        assert y.isfinite().all() and y.abs().max() > 0.01
        for field in ("gates", "logits", "probabilities"):
            first, second = (getattr(one.last_routing, field) for one in (pruned, other))
            torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)
        routing = pruned.last_routing
        assert (routing.gates >= 0).all() and not routing.gates[:, len(KEPT) :].any()
        torch.testing.assert_close(
            routing.probabilities.sum(dim=1), torch.ones(len(routing.gates)).double()
        )
        if routing.chosen is None:
            assert torch.equal(routing.gates, routing.probabilities)
    torch.testing.assert_close(other.state_dict(), pruned.state_dict())


@pytest.mark.parametrize("router", [*registry.names("router"), *VARIANTS])
def test_pruning_carries_every_experts_state(router):
    """Biases, shifts, counts and rows follow their experts; those to come start at 0."""
    layer = used_layer(router_config(router))
    smaller = without_experts(layer, KEPT)
    for new, old in zip(
        smaller.router.expert_buffers(), layer.router.expert_buffers(), strict=True
    ):
        assert torch.equal(new[:3], old[KEPT])
        if old is not getattr(layer.router, "group", None):
            assert not new[3:].any()
    for name in ("logit_shift", "selection_bias", "active"):
        assert getattr(smaller.router, name)[:3].all()
    counts = smaller.losses[0].counts
    assert counts[:3].tolist() == layer.losses[0].counts[KEPT].tolist() and not counts[3:].any()
    assert smaller.created.tolist() == [3, 0, 2, 0, 0]
    for name, child in layer.router.named_children():  # noise, projections: no rows of experts
        torch.testing.assert_close(getattr(smaller.router, name).state_dict(), child.state_dict())


@pytest.mark.parametrize("coarse", ["top1", "soft"])
@pytest.mark.parametrize("kept", [[0, 2, 3], [1, 3], [2], [3, 2, 1, 0]])
def test_pruned_hierarchies_keep_their_groups_and_valid_gates(kept, coarse):
    layer = used_layer(HierarchicalRouter.Config(coarse=coarse)).eval()
    pruned = without_experts(layer, kept).eval()
    assert pruned.router.group[: len(kept)].tolist() == [e % 2 for e in kept]
    x = inputs(layer)
    pruned(x), layer(x)
    gates, before = pruned.last_routing.gates, layer.last_routing
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(24, dtype=torch.double))
    # By hand: the old probabilities without the removed experts, group by group.
    for new, logits in zip(pruned.last_routing.probabilities, before.logits, strict=True):
        groups = {e % 2 for e in kept}
        fine = {g: logits[[e for e in kept if e % 2 == g]].softmax(dim=0) for g in groups}
        for g in groups:
            mine = [i for i, e in enumerate(kept) if e % 2 == g]
            torch.testing.assert_close(new[mine] / new[mine].sum(), fine[g])


def test_growth_after_pruning_fills_the_smallest_group():
    layer = without_experts(used_layer(HierarchicalRouter.Config()), [0, 2])  # both in group 0
    assert layer.router.group.tolist() == [0, 0, 1, 1, 0]
    controller = GrowthController(layer, pruning=registry.get("pruning", "random").Config())
    for experts in (3, 4, 5):
        controller.grow(experts)
        y = layer.eval()(inputs(layer))
        assert y.isfinite().all() and layer.num_experts == experts
        torch.testing.assert_close(
            layer.last_routing.gates.sum(dim=1), torch.ones(24, dtype=torch.double)
        )


def test_projections_of_the_hash_are_no_rows_of_experts():
    layer = used_layer(HashRouter.Config(bits=ROOM))
    assert torch.equal(without_experts(layer, KEPT).router.planes, layer.router.planes)


@pytest.mark.parametrize("kept", [[], [0, 0], [4], [-1]])
def test_what_cannot_be_kept_is_refused(kept):
    layer = used_layer(router_config("topk"))
    with pytest.raises(UserError, match="must name one or more of the experts 0 to 3"):
        without_experts(layer, kept)


def test_low_rank_experts_load_into_a_pool_of_another_size():
    """With the scale of their start, which growth leaves as it is; older states had none."""
    torch.manual_seed(0)
    grown = MoELayer(6, 6, 8, num_experts=2, max_experts=4, bank="lora")
    GrowthController(grown, budget=Budget(mode="per-growth")).grow(0)
    torch.nn.init.normal_(grown.bank.w_out)
    x, state = torch.randn(5, 6), grown.state_dict()
    for hidden in (8, 12, 20):
        other = MoELayer(6, 6, hidden, num_experts=2, max_experts=4, bank="lora")
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), grown(x))
    old = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    same = MoELayer(6, 6, 8, num_experts=2, max_experts=4, bank="lora")
    same.load_state_dict(old)
    torch.testing.assert_close(same(x), grown(x))

"""`MoELayer` with parts by name: the same layer as with their Configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer
from dynmoe.moe.experts.pool import GatedPool
from dynmoe.moe.losses import SwitchLoss, ZLoss
from dynmoe.moe.routers import TopKRouter


def make(**options: Any) -> MoELayer:
    generator = torch.Generator().manual_seed(0)
    return MoELayer(8, 8, 32, num_experts=4, generator=generator, **options)


def test_names_give_the_same_layer_as_configs():
    named = make(router="topk", router_options={"k": 3}, bank="swiglu", losses=["switch", "z"])
    configs = make(
        router=TopKRouter.Config(k=3),
        bank=GatedPool.Config(),
        losses=[SwitchLoss.Config(), ZLoss.Config()],
    )
    assert named.router.k == 3 and repr(named) == repr(configs)
    x = torch.randn(5, 8)
    assert torch.equal(named(x), configs(x))
    assert named.last_losses.keys() == configs.last_losses.keys() == {"switch", "z"}


@pytest.mark.parametrize("kind", ["router", "loss"])
def test_every_name_is_taken(kind: str):
    for name in registry.names(kind):
        part = registry.get(kind, name)
        layer = make(**({"router": name} if kind == "router" else {"losses": [name]}))
        if kind == "router":
            assert type(layer.router) is part
        else:
            assert [type(loss) for loss in layer.losses] == ([] if name == "none" else [part])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"router": "topkk"}, "unknown router 'topkk'.*Did you mean 'topk'"),
        ({"router": "topk", "router_options": {"kk": 2}}, "option of topk 'kk'.*mean 'k'"),
        ({"bank": "pol"}, "unknown bank 'pol'.*Did you mean 'pool'"),
        ({"losses": ["swich"]}, "unknown loss 'swich'.*Did you mean 'switch'"),
        ({"router_options": {"k": 2}}, "router_options={'k': 2} needs the router's name"),
        ({"bank": GatedPool.Config(), "bank_options": {"a": 1}}, "needs the bank's name"),
        ({"losses": ["switch", SwitchLoss.Config()]}, "loss switch is given twice"),
        ({"gate_scale": "expert"}, "gate_scale='expert' is neither experts nor one"),
        ({"route_per": "samples"}, "route_per='samples' is neither token nor sample"),
        ({"router": "noisy-topk", "router_options": {"noise": "none"}},
         "router noisy-topk: noise='none' is neither learned nor fixed"),
        ({"bank": "pool", "bank_options": {"output_init": "own"}},
         "bank pool: output_init='own' is neither pool nor expert"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_one_error(options: dict[str, Any], match: str):
    with pytest.raises(UserError, match=match):
        make(**options)

"""Initial weights of the adapters: who decides them, and how they are brought back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dg_cases import CLASSES, METHODS, SMALL, tiny_vit
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.dg.adapters import KroneckerAdapter, LoRAAdapter, SharedFactors
from dynmoe.dg.bank import AdapterBank
from dynmoe.dg.method import DGMethod
from dynmoe.dg.methods.baselines import Bottleneck
from dynmoe.dg.methods.experts import HyperBank
from dynmoe.dg.moa import MoAConfig, MoALinear

Make = Callable[[], nn.Module]
OPTIONS = MoAConfig(ranks=(1, 2), gate_dim=5, terms=4)


def adapter_bank(adapter: str, synthesis: str) -> AdapterBank:
    config = AdapterBank.Config(
        options=OPTIONS, adapter=adapter, synthesis=synthesis, init_noise=0.1, layers=2,
        width_in=8, width_out=12,
    )  # fmt: skip
    return config.build(8, 0, 0, 2, 3, "relu", None)


def base() -> nn.Linear:
    """A frozen layer that is none of the adapters' business."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(8, 12)


def kronecker() -> nn.Sequential:
    shared = SharedFactors(4, None)
    return nn.Sequential(shared, KroneckerAdapter(base(), shared, 2, None))


def bottleneck() -> Bottleneck:
    rules = (nn.Parameter(torch.ones(2, 2, 2)), nn.Parameter(torch.ones(2, 2, 2)))
    return Bottleneck(8, 4, rules, None)


MAKERS: dict[str, Make] = {
    "Kronecker sets": lambda: adapter_bank("kadaptation", "factors"),
    "LoRA sets": lambda: adapter_bank("lora", "deltas"),
    "generated experts": lambda: HyperBank.Config(code_dim=6).build(5, 3, 7, 2, 4, "relu", None),
    "MoA layer": lambda: MoALinear(base(), OPTIONS, None),
    "LoRA": lambda: LoRAAdapter(base(), 2, 4.0, None),
    "Kronecker adapter": kronecker,
    "bottleneck": bottleneck,
}
every_module = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers but those of a frozen base."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value for name, value in named if "base" not in name}


def reset(module: nn.Module) -> None:
    for part in module if isinstance(module, nn.Sequential) else [module]:
        part.reset_parameters()


@every_module
def test_a_module_goes_back_to_what_the_seed_gives(make):
    torch.manual_seed(1)
    first, second = make(), make()
    assert any(not torch.equal(value, own(second)[name]) for name, value in own(first).items())
    with torch.no_grad():
        for value in own(second).values():
            value.fill_(77)
    torch.manual_seed(1)
    reset(second)
    torch.testing.assert_close(own(second), own(first), rtol=0, atol=0)


@every_module
def test_a_module_made_on_the_meta_device_is_filled_by_a_reset(make):
    torch.manual_seed(1)
    direct = make()
    state = torch.get_rng_state()
    with torch.device("meta"):
        module = make()
    reset(module)
    assert torch.equal(torch.get_rng_state(), state)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for value in own(module).values():
            value.fill_(77)
    torch.manual_seed(1)
    reset(module)
    torch.testing.assert_close(own(module), own(direct), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_a_generator_follow_the_global_seed(name):
    def make(seed: int) -> DGMethod:
        vit = tiny_vit()
        torch.manual_seed(seed)
        return registry.get("dg", name).Config(**SMALL.get(name, {})).build(vit, CLASSES, None)

    first, again, other = make(1), make(1), make(2)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.head.weight, other.head.weight)

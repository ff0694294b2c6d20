"""Trained low-rank adapters, frozen and mixed token by token and layer by layer.

X-LoRA (Buehler and Buehler 2024, arXiv 2402.07148): what several fine-tunings of one model have
learnt is kept, and small scaling heads learn how much of each a token needs. Adapters are experts
of the bank `lora`, heads are routers (`xlora`, or any other).

Shapes: r rank of an adapter in a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.experts.low_rank import LoRAPool
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.routers.soft import ScalingRouter
from dynmoe.moe.upcycle import Adapted, adapt_linears
from dynmoe.registry import PartConfig

Adapter = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a linear layer -> A [r, D_in] and B [D_out, r]; `B A x` is added to the layer's output,
so that a factor alpha / r stands in B."""


@torch.no_grad()
def adapter_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of the adapters of a model that `adapt_linears` gave LoRA experts, one in each layer.

    Of each layer, by its name: A [R, D_in] and B [D_out, R], the latter times alpha / r.

    Raises:
        UserError: there are none, or a layer has more experts, or gates other than 1.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        layer = module.layer
        bank, router = layer.bank, layer.router
        alone = layer.num_experts == 1 and layer.shared is None and router.normalised
        if not isinstance(bank, LoRAPool) or not alone:
            raise UserError(
                f"adapter_of: {name} is no single LoRA adapter: it has {layer.num_experts} "
                f"expert(s) of the bank {bank.name!r} and the router {router.name!r}"
            )
        found[name] = (bank.w_in.detach().clone(), bank.w_out.detach() * bank.scale)
    if not found:
        raise UserError("adapter_of: the model has no adapters; see adapt_linears")
    return found


def mix_adapters(
    model: nn.Module,
    adapters: Sequence[Adapter],
    *,
    router: PartConfig | None = None,
    max_experts: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Adapted]:
    """Put frozen adapters beside linear layers of a model, in place; their routers learn.

    Only what is adapted is frozen; freeze the rest of the model yourself if it should not learn.

    Args:
        model: without adapters, such as the one from which all fine-tunings began.
        adapters: their ranks may differ; all must name the same layers.
        router: Config of the heads; default `xlora`, a softmax.
        max_experts: room for adapters to come, see `set_adapter`; default: none.
        generator: draws the heads; None: torch's global one.

    Returns:
        The new modules by name, in the adapters' order.

    Raises:
        UserError: no adapter, adapters of other layers, or of shapes that do not fit.
    """
    if not adapters or not adapters[0]:
        raise UserError("mix_adapters: no adapter is given; give one or more")
    linears = dict(model.named_modules())
    for number, adapter in enumerate(adapters):
        if set(adapter) != set(adapters[0]):
            odd = sorted(set(adapter) ^ set(adapters[0]))[0]
            raise UserError(
                f"mix_adapters: {odd} is in adapter {number} or in the first one only; all must "
                "adapt the same layers"
            )
        for name, (a, b) in adapter.items():
            linear = linears.get(name)
            if not isinstance(linear, nn.Linear):
                raise UserError(f"mix_adapters: {name!r} is not a linear layer of the model")
            _check_shapes(a, b, len(a), (linear.in_features, linear.out_features), name)
    adapted: dict[str, Adapted] = {}
    for name in adapters[0]:
        ranks = [len(adapter[name][0]) for adapter in adapters]

        def make(dim_in: int, dim_out: int, ranks: list[int] = ranks) -> MoELayer:
            return _layer(dim_in, dim_out, ranks, router, max_experts, generator)

        adapted |= adapt_linears(model, [name], make)
        for expert, adapter in enumerate(adapters):
            set_adapter(adapted[name].layer, expert, *adapter[name])
    return adapted


@torch.no_grad()
def set_adapter(layer: MoELayer, expert: int, a: Tensor, b: Tensor) -> None:
    """Give an expert that exists, such as growth's latest, the weights of an adapter.

    Growth makes room, see `dynmoe.moe.import_experts.set_expert`: with a budget per growth of the
    adapter's rank.

    Args:
        layer: with the bank `lora`.
        expert: its number.
        a: A [r, D_in], r the expert's ranks.
        b: B [D_out, r].

    Raises:
        UserError: another bank, no such expert, or shapes that do not fit.
    """
    bank = layer.bank
    if not isinstance(bank, LoRAPool):
        raise UserError(f"set_adapter: bank {bank.name!r} holds no adapters; allowed is 'lora'")
    if not 0 <= expert < layer.num_experts:
        raise UserError(
            f"set_adapter: expert={expert} must be one of the {layer.num_experts} there"
        )
    rank = bank.hidden_sizes()[expert]
    _check_shapes(a, b, rank, (bank.w_in.shape[1], len(bank.w_out)), f"expert {expert}")
    units = (bank.segment == expert).nonzero().flatten()
    bank.w_in[units] = a.to(bank.w_in)
    bank.w_out[:, units] = (b / bank.scale).to(bank.w_out)


def _layer(
    dim_in: int,
    dim_out: int,
    ranks: list[int],
    router: PartConfig | None,
    max_experts: int | None,
    generator: torch.Generator | None,
) -> MoELayer:
    """Room for the adapters of one layer, frozen, and their head."""
    layer = MoELayer(
        dim_in, dim_out, sum(ranks), num_experts=len(ranks), max_experts=max_experts,
        router=router or ScalingRouter.Config(), bank=LoRAPool.Config(), gate_scale="one",
        generator=generator,
    )  # fmt: skip
    bank = layer.bank
    assert isinstance(bank, LoRAPool)
    bank.initial_sizes = ranks
    bank.set_hidden_sizes(ranks)
    bank.requires_grad_(False)
    return layer


def _check_shapes(a: Tensor, b: Tensor, rank: int, widths: tuple[int, int], where: str) -> None:
    wanted = [(rank, widths[0]), (widths[1], rank)]
    found = [tuple(a.shape), tuple(b.shape)]
    if found != wanted:
        raise UserError(f"adapter of {where}: A and B are {found}, and must be {wanted}")

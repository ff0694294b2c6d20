"""Experts that were trained apart: MLPs, or whole models, become one mixture of experts.

`experts_from_mlps` makes a layer of them. `mix_models` is Branch-Train-MiX (BTX, Sukhbaatar et al.
2024, arXiv 2403.07816): feed-forward blocks of models with one origin become experts, the mean is
taken of all else, and what is left to train are the routers. `set_expert` gives an expert that
growth has added the weights of one more MLP; with the `nexus` router its row comes from a domain
embedding, and nothing needs to be trained again (Nexus, Gritsch et al. 2024, arXiv 2408.15901).

Shapes: H hidden units of all MLPs together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.experts.pool import HiddenPool
from dynmoe.moe.layer import MoELayer, RoutePer
from dynmoe.moe.router import Router
from dynmoe.moe.routers.nexus import NexusRouter
from dynmoe.moe.upcycle import mlp_parts
from dynmoe.registry import PartConfig


@torch.no_grad()
def experts_from_mlps(
    mlps: Sequence[nn.Module],
    *,
    shared: nn.Module | None = None,
    max_experts: int | None = None,
    router: PartConfig | Router | str | None = None,
    losses: Sequence[PartConfig | str] = (),
    route_per: RoutePer = "token",
    generator: torch.Generator | None = None,
) -> MoELayer:
    """A layer whose experts are the given MLPs, in their order; the router is new.

    Gates are used as the router gives them, so that experts which agree are reproduced by any
    router whose gates sum to 1.

    Args:
        mlps: each as `upcycle` takes it, of equal widths and activation; hidden units may differ.
        shared: an MLP that every sample uses beside them with gate 1, as Nexus keeps the model that
            all experts began as.
        max_experts: most experts the layer can grow to; default: as many as MLPs.
        router: as in `MoELayer`.
        losses: as in `MoELayer`.
        route_per: as in `MoELayer`.
        generator: draws the router; None: torch's global one.

    Raises:
        UserError: no MLP, one that `upcycle` does not take, or MLPs that differ.
    """
    if not mlps:
        raise UserError("experts_from_mlps: no MLP is given; give one or more")
    named = {f"number {n}": mlp for n, mlp in enumerate(mlps)}
    _check_agree(named if shared is None else {**named, "shared": shared})
    first, activation, second = mlp_parts(mlps[0])
    sizes = [mlp_parts(mlp)[0].out_features for mlp in mlps]
    layer = MoELayer(
        first.in_features,
        second.out_features,
        sum(sizes),
        num_experts=len(sizes),
        max_experts=max_experts,
        router=router,
        losses=losses,
        shared_hidden=0 if shared is None else mlp_parts(shared)[0].out_features,
        route_per=route_per,
        gate_scale="one",
        activation=activation,
        generator=generator,
    ).to(first.weight)
    bank = layer.bank
    assert isinstance(bank, HiddenPool)
    bank.initial_sizes = sizes
    bank.set_hidden_sizes(sizes)
    for number, mlp in enumerate(mlps):
        _fill(bank, number, mlp)
    if shared is not None:
        assert isinstance(layer.shared, HiddenPool)
        _fill(layer.shared, 0, shared)
    return layer.train(mlps[0].training)


def _check_agree(mlps: dict[str, nn.Module]) -> None:
    """Refuse MLPs, by name, of other widths or another activation than the first one's."""
    parts = {name: mlp_parts(mlp) for name, mlp in mlps.items()}
    told = {
        n: f"{a.in_features} -> {b.out_features} with {act}" for n, (a, act, b) in parts.items()
    }
    first = next(iter(told.values()))
    for name, found in told.items():
        if found != first:
            raise UserError(
                f"experts_from_mlps: MLP {name} is {found}, the first one {first}; all must agree"
            )


@torch.no_grad()
def set_expert(layer: MoELayer, expert: int, mlp: nn.Module, domain: Tensor | None = None) -> None:
    """Give an expert that exists, such as growth's latest, the weights of a trained MLP.

    Growth makes room: `GrowthController(model, budget=Budget(mode="per-growth", units=...),
    init=RandomInit.Config(router="new"))` leaves the old experts and their router rows alone.

    Args:
        layer: with the bank `pool`.
        expert: its number.
        mlp: as `upcycle` takes it, of the layer's widths, with the expert's hidden units.
        domain: [C] embedding of what the MLP was trained on, for the `nexus` router.

    Raises:
        UserError: no such expert, another bank, an MLP that does not fit, or a domain for a router
            that knows none.
    """
    bank = layer.bank
    if not isinstance(bank, HiddenPool):
        raise UserError(f"set_expert: bank {bank.name!r} holds no MLPs; allowed is 'pool'")
    if not 0 <= expert < layer.num_experts:
        raise UserError(f"set_expert: expert={expert} must be one of the {layer.num_experts} there")
    one, activation, other = mlp_parts(mlp)
    found = (one.in_features, one.out_features, other.out_features)
    units = bank.hidden_sizes()[expert]
    wanted = (bank.w_in.shape[1], units, len(bank.w_out))
    if found != wanted or type(bank.act) is not type(_activation(mlp)):
        raise UserError(
            f"set_expert: the MLP is {' -> '.join(map(str, found))} with {activation}, expert "
            f"{expert} is {' -> '.join(map(str, wanted))} with {bank.act}; they must agree"
        )
    if domain is not None and not isinstance(layer.router, NexusRouter):
        raise UserError(
            f"set_expert: router {layer.router.name!r} knows no domains; use the router 'nexus', "
            "or leave domain out"
        )
    _fill(bank, expert, mlp)
    if domain is not None and isinstance(layer.router, NexusRouter):
        layer.router.set_domain(expert, domain)


@torch.no_grad()
def mix_models(models: Sequence[nn.Module], match: str, **options: object) -> nn.Module:
    """One model of several of the same shape: their MLPs are its experts, all else their mean.

    Models should descend from one: the mean of weights that were never alike computes nothing.
    Buffers of whole numbers are the first model's. `dynmoe.moe.model.share_router` can let all
    layers use one router.

    Args:
        models: left as they are.
        match: a regular expression searched for in the names of modules; each that matches is an
            MLP as `upcycle` takes it, and no matching module holds another.
        options: of `experts_from_mlps`; one generator serves all layers.

    Raises:
        UserError: no model, models of different shapes, nothing matches, or what matches is no MLP.
    """
    if not models:
        raise UserError("mix_models: no model is given; give one or more")
    _check_alike(models)
    names = [name for name, _ in models[0].named_modules() if name and re.search(match, name)]
    if not names:
        known = ", ".join([name for name, _ in models[0].named_modules() if name][:8])
        raise UserError(
            f"mix_models: {match!r} matches no module of the model; it has {known}, ..."
        )
    mixed = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for key, value in mixed.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.stack([state[key].double() for state in states]).mean(dim=0))
    for name in names:
        mlps = [model.get_submodule(name) for model in models]
        layer = experts_from_mlps(mlps, **options)  # type: ignore[arg-type]
        mean = mixed.get_submodule(name)
        for parent in list(mixed.modules()):
            for own, child in list(parent._modules.items()):  # also of a module with several names
                if child is mean:
                    setattr(parent, own, layer)
    return mixed


def _check_alike(models: Sequence[nn.Module]) -> None:
    """Refuse models whose states differ in names or shapes."""
    first = {key: tuple(value.shape) for key, value in models[0].state_dict().items()}
    for number, model in enumerate(models):
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for key in [*first, *shapes]:
            if first.get(key) != shapes.get(key):
                raise UserError(
                    f"mix_models: {key} is {shapes.get(key, 'absent')} in model {number} and "
                    f"{first.get(key, 'absent')} in the first one; all must have one shape"
                )


def _fill(bank: HiddenPool, expert: int, mlp: nn.Module) -> None:
    """Copy an MLP's weights into an expert's units; a missing bias is 0."""
    first, _, second = mlp_parts(mlp)
    units = (bank.segment == expert).nonzero().flatten()
    bank.w_in[units] = first.weight.to(bank.w_in)
    bank.w_out[:, units] = second.weight.to(bank.w_out)
    bank.b_in[units] = 0.0 if first.bias is None else first.bias.to(bank.b_in)
    bank.b_out[expert] = 0.0 if second.bias is None else second.bias.to(bank.b_out)


def _activation(mlp: nn.Module) -> nn.Module:
    """The activation between the two maps."""
    known = [m for m in mlp.children() if not isinstance(m, nn.Linear | nn.Dropout | nn.Identity)]
    return known[0]

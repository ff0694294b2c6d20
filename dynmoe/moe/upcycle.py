"""Upcycling: a trained dense network gets experts, and computes the same at first.

`upcycle` makes a mixture of experts of an MLP. "split" divides the MLP's units (expert
construction of MoEfication, Zhang et al. 2022, arXiv 2110.01786). Gates are scaled by the number of
experts used and start equal, so that the function is kept where all experts are used. For equal
gates all router rows start as copies of the first (our choice): a row of zeros has no direction,
and a cosine router's gradient there is unbounded. "copy" makes every expert the whole MLP (sparse
upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055, Section 3), so that the function is kept by
any router whose gates sum to 1; the layer has E times the MLP's units.

`adapt_linears` puts experts beside frozen linear layers.

Shapes: H hidden units of the MLP, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynmoe.errors import UserError
from dynmoe.moe.bank import ACTIVATIONS, even_sizes
from dynmoe.moe.experts.pool import HiddenPool
from dynmoe.moe.layer import MoELayer, RoutePer
from dynmoe.moe.router import Router
from dynmoe.registry import PartConfig

NAMES = {kind: name for name, kind in ACTIVATIONS.items() if kind is not nn.Identity}


@torch.no_grad()
def upcycle(
    mlp: nn.Module,
    num_experts: int,
    *,
    how: Literal["split", "copy"] = "split",
    cluster: bool = False,
    max_experts: int | None = None,
    router: PartConfig | Router | None = None,
    losses: Sequence[PartConfig] = (),
    route_per: RoutePer = "token",
    generator: torch.Generator | None = None,
) -> MoELayer:
    """An MoE layer with the weights, dtype, device and training mode of an MLP.

    `diagnostics.function_change(mlp, layer, x)` tells how close the two are.

    Args:
        mlp: `nn.Sequential` of Linear, activation and Linear, or `fc2(act(fc1(x)))` of a module
            with these names, as timm's Mlp. Missing biases become zeros that can learn.
        how: "split" divides the units among the experts, "copy" gives each expert all.
        cluster: split by balanced k-means of the units' input weights, not by their order.
        max_experts: as in `MoELayer`.
        router: as in `MoELayer`.
        losses: as in `MoELayer`.
        route_per: as in `MoELayer`.
        generator: draws the router and the clusters' start; None: torch's global one.

    Raises:
        UserError: another kind of module, an activation other than ReLU, exact GELU, SiLU and
            Tanh, dropout, more experts than units to split, or an unknown `how`.
    """
    if how not in ("split", "copy"):
        raise UserError(f"upcycle: how={how!r} must be 'split' or 'copy'")
    if cluster and how == "copy":
        raise UserError("upcycle: cluster=True needs how='split'; copies are not clustered")
    first, activation, second = mlp_parts(mlp)
    hidden, copies = first.out_features, num_experts if how == "copy" else 1
    layer = MoELayer(
        first.in_features,
        second.out_features,
        hidden * copies,
        num_experts=num_experts,
        max_experts=max_experts,
        router=router,
        losses=losses,
        route_per=route_per,
        gate_scale="experts" if how == "split" else "one",
        activation=activation,
        generator=generator,
    ).to(first.weight)
    units = torch.arange(hidden, device=first.weight.device).repeat(copies)
    if cluster:
        sizes = even_sizes(hidden, num_experts)
        owner = balanced_clusters(first.weight, sizes, generator)
        units = owner.argsort(stable=True).to(units)
    _fill(layer, first, second, units, num_experts if how == "split" else 1)
    if how == "split":
        for rows in layer.router.expert_rows():
            rows[:num_experts] = rows[0].clone()
    return layer.train(mlp.training)


def upcycle_vit(
    model: nn.Module, num_experts: int, blocks: Sequence[int] | None = None, **options: Any
) -> list[str]:
    """Replace the MLPs of a timm VisionTransformer by MoE layers, in place.

    Args:
        model: has `blocks`, each with an `mlp` that `upcycle` takes.
        blocks: which blocks, by number, from the end if negative; all by default.
        options: of `upcycle`; one generator serves all blocks, so that their routers differ.

    Returns:
        The names of the new layers.

    Raises:
        UserError: not such a model, no such block, or an MLP that cannot be converted; the model
            is then as it was.
    """
    mlps = [getattr(block, "mlp", None) for block in getattr(model, "blocks", [])]
    if not mlps or any(mlp is None for mlp in mlps):
        raise UserError(
            f"upcycle_vit: {type(model).__name__} has no blocks with an mlp, as a timm "
            "VisionTransformer has; use upcycle on its MLPs instead"
        )
    count = len(mlps)
    chosen = range(count) if blocks is None else blocks
    for number in chosen:
        if not -count <= number < count:
            raise UserError(f"upcycle_vit: block {number} must be between {-count} and {count - 1}")
    numbers = sorted({number % count for number in chosen})
    layers = [upcycle(mlps[number], num_experts, **options) for number in numbers]  # type: ignore[arg-type]
    for number, layer in zip(numbers, layers, strict=True):
        model.get_submodule(f"blocks.{number}").mlp = layer
    return [f"blocks.{number}.mlp" for number in numbers]


def _fill(layer: MoELayer, first: nn.Linear, second: nn.Linear, units: Tensor, shares: int) -> None:
    """Give the pool the MLP's `units` [H'], and each expert a share of the output bias."""
    bank = layer.bank
    assert isinstance(bank, HiddenPool)
    bank.w_in.copy_(first.weight[units])
    bank.w_out.copy_(second.weight[:, units])
    bank.b_in.zero_() if first.bias is None else bank.b_in.copy_(first.bias[units])
    bank.b_out.zero_() if second.bias is None else bank.b_out.copy_(second.bias / shares)


def mlp_parts(mlp: nn.Module) -> tuple[nn.Linear, str, nn.Linear]:
    """First linear map, name of the activation, and second linear map of a two-layer MLP.

    Raises:
        UserError: another kind of module, see `upcycle`.
    """
    known = isinstance(mlp, nn.Sequential) or all(hasattr(mlp, n) for n in ("fc1", "act", "fc2"))
    modules = [module for module in mlp.children() if not isinstance(module, nn.Identity)]
    for module in modules:
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UserError(
                f"upcycle: the MLP has dropout {module.p}, MoE layers have none; set its p to 0"
            )
    parts = [module for module in modules if not isinstance(module, nn.Dropout)]
    if (
        not known
        or len(parts) != 3
        or not isinstance(parts[0], nn.Linear)
        or not isinstance(parts[2], nn.Linear)
        or parts[0].out_features != parts[2].in_features
    ):
        found = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise UserError(
            f"upcycle: {type(mlp).__name__} of {found} is no two-layer MLP; allowed are "
            "nn.Sequential(Linear, activation, Linear) and modules with fc1, act and fc2"
        )
    activation = NAMES.get(type(parts[1]))
    if activation is None or getattr(parts[1], "approximate", "none") != "none":
        raise UserError(
            f"upcycle: activation {parts[1]} is not known; allowed are ReLU, GELU (exact), SiLU "
            "and Tanh"
        )
    return parts[0], activation, parts[2]


def balanced_clusters(
    rows: Tensor, sizes: list[int], generator: torch.Generator | None, steps: int = 30
) -> Tensor:
    """k-means with given cluster sizes: the cluster of each row [H, D], `[H]` int64 on the CPU.

    MoEfication (arXiv 2110.01786) splits by balanced k-means. Here (our choice) the
    rows that care most, by the distance between their nearest and farthest centre, take their
    place first, each in the nearest cluster that has room. That does not fall at every step: the
    best assignment seen is kept.
    """
    rows = rows.detach().double().cpu()
    centres = rows[torch.randperm(len(rows), generator=generator)[: len(sizes)]]
    best, least = torch.empty(0, dtype=torch.long), float("inf")
    for _ in range(steps):
        owner = _seats(torch.cdist(rows, centres).square(), sizes)
        centres = torch.stack([rows[owner == e].mean(dim=0) for e in range(len(sizes))])
        cost = float((rows - centres[owner]).square().sum())
        if cost < least:
            best, least = owner, cost
    return best


def _seats(distance: Tensor, sizes: list[int]) -> Tensor:
    """[H] a cluster for each row of `distance` [H, E], `sizes[e]` rows for cluster e."""
    room, owner = list(sizes), torch.empty(len(distance), dtype=torch.long)
    nearest = distance.argsort(dim=1, stable=True).tolist()
    eager = (distance.amin(dim=1) - distance.amax(dim=1)).argsort(stable=True)
    for row in eager.tolist():
        cluster = next(c for c in nearest[row] if room[c])
        room[cluster] -= 1
        owner[row] = cluster
    return owner


MakeLayer = Callable[[int, int], MoELayer]
"""(input width, output width) -> layer"""


class Adapted(nn.Module):
    """A frozen linear layer and an MoE layer that learns to correct it, `y = base(x) + layer(x)`.

    With the `lora` bank these are LoRA experts (Hu et al. 2021, arXiv 2106.09685); as its experts
    start silent, the network starts as it was.

    Args:
        base: [..., D_in] -> [..., D_out]; its parameters stop to require gradients.
        layer: of the same widths; moved to the device and dtype of `base`.
    """

    def __init__(self, base: nn.Linear, layer: MoELayer) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.layer = layer.to(base.weight)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, as `MoELayer.reset_parameters`; the base keeps its weights."""
        self.layer.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        return self.base(x) + self.layer(x)


def adapt_linears(
    model: nn.Module, match: str | Sequence[str], make_layer: MakeLayer
) -> dict[str, Adapted]:
    """Put an MoE layer beside linear layers of a model, in place.

    Example: `adapt_linears(vit, "attn.qkv$", lambda d_in, d_out: MoELayer(d_in, d_out, 8,
    num_experts=2, max_experts=4, bank=LoRAPool.Config()))`.

    Only the layers that match are frozen; freeze the rest of the model yourself if it should not
    learn either. Linear layers inside MoE layers, layers adapted before, and the output map of
    torch's MultiheadAttention, which is never called, are passed over.

    Args:
        model: its linear layers are replaced by `Adapted`; it is not one itself.
        match: a regular expression searched for in the layers' names, or their full names.
        make_layer: called for each layer, in module order.

    Returns:
        The new modules by name, in module order.

    Raises:
        UserError: nothing matches, or a name in the list is not that of such a layer.
    """
    linears = _linears(model)
    if isinstance(match, str):
        names = [name for name in linears if re.search(match, name)]
    else:
        names = [name for name in linears if name in set(match)]
        for name in match:
            if name not in linears:
                raise UserError(f"{name!r} is not a linear layer of the model; {_known(linears)}")
    if not names:
        raise UserError(f"{match!r} matches no linear layer of the model; {_known(linears)}")
    adapted = {}
    for name in names:
        base = linears[name]
        adapted[name] = Adapted(base, make_layer(base.in_features, base.out_features))
        for parent in [m for m in model.modules() if not isinstance(m, Adapted)]:
            for own, child in list(parent._modules.items()):  # each name, also of one module
                if child is base:
                    setattr(parent, own, adapted[name])
    return adapted


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by name that can be adapted; one with several names under the first."""
    closed = [m for m in model.modules() if isinstance(m, (MoELayer, Adapted))]
    inside = {part for module in closed for part in module.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and module is not model
        and module not in inside
    }


def _known(linears: dict[str, nn.Linear]) -> str:
    """The end of an error message: which layers there are."""
    names = list(linears)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are: {', '.join(names[:8])}{more}" if names else "it has none"

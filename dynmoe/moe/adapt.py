"""Experts beside the frozen linear layers of a trained network."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynmoe.errors import UserError
from dynmoe.moe.layer import MoELayer

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
        _replace(model, base, adapted[name])
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


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the model."""
    for parent in [m for m in model.modules() if not isinstance(m, Adapted)]:
        for name, child in list(parent._modules.items()):  # each name, also of one module
            if child is old:
                setattr(parent, name, new)


def _known(linears: dict[str, nn.Linear]) -> str:
    """The end of an error message: which layers there are."""
    names = list(linears)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are: {', '.join(names[:8])}{more}" if names else "it has none"

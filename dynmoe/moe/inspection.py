"""Looking into MoE layers: how alike the experts are, and what each is used for.

Shapes: N samples, E active experts, L labels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.evaluation import undisturbed
from dynmoe.moe.layer import MoELayer, moe_layers
from dynmoe.moe.stats import gate_shares, row_labels


@torch.no_grad()
def weight_similarity(layer: MoELayer) -> Tensor:
    """How alike the active experts' weights are: [E, E] float64 on the CPU, 1 on the diagonal.

    Banks with hidden units: `||W_i W_j^T||^2 / (||W_i W_i^T|| ||W_j W_j^T||)` with Frobenius norms,
    W_e the expert's units as rows, each with all its weights and biases but the output's. It is
    the cosine of the matrices `W_e^T W_e`, lies in 0..1, and knows no order of units; experts of
    different sizes compare. Other banks: cosine of all of an expert's parameters, in -1..1. Both
    are our choice. An expert of zeros has similarity 0 to all.
    """
    bank, experts = layer.bank, range(layer.num_experts)
    if not isinstance(bank, UnitBank):
        rows = torch.cat([p.flatten(1).double() for p in bank.expert_rows()], dim=1)
        rows = F.normalize(rows[: len(experts)], dim=1)
        return (rows @ rows.T).cpu()
    inner = [(getattr(bank, name), axis) for name, axis in bank.unit_axes()]
    sides = [
        parameter.movedim(axis, 0).reshape(len(bank.segment), -1).double()
        for parameter, axis in inner
        if parameter is not bank.output_weight()
    ]
    units = torch.cat(sides, dim=1)
    return _overlaps([units[bank.segment == e].T for e in experts])


@torch.no_grad()
def output_similarity(layer: MoELayer, x: Tensor, how: Literal["cosine", "cka"]) -> Tensor:
    """How alike the active experts' outputs on x are: [E, E] float64 on the CPU.

    Args:
        layer: left as it was.
        x: input of the layer; every position of a sample counts as a sample.
        how: "cosine": mean over samples of the cosine of two experts' outputs, in -1..1. "cka":
            linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, Section 3),
            in 0..1: blind to rotations and scale of the outputs. An expert of constant output has
            0 to all.

    Raises:
        UserError: an unknown `how`.
    """
    if how not in ("cosine", "cka"):
        raise UserError(f"output_similarity: how={how!r} must be 'cosine' or 'cka'")
    with undisturbed(layer):
        rows = x if layer.bank.per_sample else x.reshape(-1, x.shape[-1])
        outputs = layer.bank.expert_outputs(rows)[: layer.num_experts].double()
    axis = layer.bank.channel_axis if layer.bank.per_sample else -1
    features = [y.movedim(axis, -1).flatten(0, -2) for y in outputs]  # each [N, D]
    if how == "cka":
        return _overlaps([y - y.mean(dim=0) for y in features])
    unit = F.normalize(torch.stack(features), dim=2)
    return (unit.flatten(1) @ unit.flatten(1).T).cpu() / unit.shape[1]


def _overlaps(matrices: list[Tensor]) -> Tensor:
    """[E, E] of `||A_i^T A_j||^2 / (||A_i^T A_i|| ||A_j^T A_j||)` (Frobenius) for A_e [N, D_e]."""
    table = torch.zeros(len(matrices), len(matrices), dtype=torch.double)
    for i, a in enumerate(matrices):
        for j, b in enumerate(matrices[: i + 1]):
            table[i, j] = table[j, i] = (a.T @ b).square().sum()
    own = table.diagonal().sqrt()
    return table / torch.outer(own, own).clamp_min(torch.finfo(torch.double).tiny)


def routing_table(
    gates: Tensor, labels: Tensor, num_labels: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean gate share of each expert on the samples of each label: [E, L] float64 on the CPU.

    Columns sum to 1; that of a label without samples is nan.

    Args:
        gates: [N, E].
        labels: [N] int64, of classes, tasks, floors, ...; or one for every N / len(labels) rows,
            as where each token of a sample is routed.
        num_labels: L; by default one more than the largest label.
        mask: [N] bool, False for padding, which does not count; None: all samples are real.
    """
    shares = gate_shares(gates).cpu()
    labels = row_labels(labels.cpu(), len(shares))
    if mask is not None:
        shares, labels = shares[mask.cpu()], labels[mask.cpu()]
    member = F.one_hot(labels, -1 if num_labels is None else num_labels).double()
    return (shares.T @ member) / member.sum(dim=0)


@torch.no_grad()
def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each MoE layer is given while the model computes x, by layer name.

    In evaluation mode; the model is left as it was. A layer that runs twice gives its last input.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str, layer: MoELayer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = (args[0] if args else kwargs["x"]).detach().clone()

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, layer) for name, layer in moe_layers(model)]
    try:
        with undisturbed(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen

"""Penalties on weights: towards 0, towards the start or earlier tasks' values, on spectra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Anchored, Intervention, Limit, one_task
from dynmoe.interventions.units import NORMS, Slot
from dynmoe.interventions.weights import weight_matrices
from dynmoe.moe import moe_layers
from dynmoe.registry import PartConfig


class L2(Intervention, name="l2", source="Krogh & Hertz 1991, Eq. 1"):
    """Penalises the squared norm of all parameters.

    `strength * ||theta||^2`, summed over all parameters, biases too; rows reserved for experts to
    come do not count. Unlike weight decay it goes through the optimizer's moments.
    """

    limits: ClassVar = {"strength": Limit.AT_LEAST_0}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of L2."""

        strength: float = 1e-4
        """factor of the squared norm (our choice; Dohare et al. 2024 search 1e-3 to 1e-6)"""

    def penalty(self) -> Tensor:
        """The penalty at the present weights: a scalar."""
        squares = {p: p.square() for p in self.model.parameters() if p.requires_grad}
        for _, layer in moe_layers(self.model):
            for rows in (*layer.router.expert_rows(), *layer.bank.expert_rows()):
                if rows in squares:
                    active = layer.router.active.view(-1, *[1] * (rows.dim() - 1))
                    squares[rows] = torch.where(active, squares[rows], 0.0)
        sums = [square.sum() for square in squares.values()]
        return self.config.strength * torch.stack(sums).sum()


class L2Init(Anchored, name="l2-init", source="Kumar et al. 2023 (arXiv 2308.11958), Section 4"):
    """Penalises the squared distance of all parameters from their first values.

    `strength * ||theta - theta_0||^2`, summed over all parameters, biases too. What a growth draws
    or copies is measured from where it stood then.
    """

    limits: ClassVar = {"strength": Limit.AT_LEAST_0}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of L2-Init."""

        strength: float = 1e-3
        """factor of the squared distance"""

    def penalty(self) -> Tensor:
        """The penalty at the present weights."""
        distances = [(p - first).square().sum() for p, first in self.pairs()]
        return self.config.strength * torch.stack(distances).sum()


class Spectral(
    Intervention, name="spectral", source="Lewandowski et al. 2025 (arXiv 2406.06811), Section 4"
):
    """Keeps the largest singular value of every layer near 1.

    `strength * (sum_l (sigma_max(W_l)^k - 1)^2 + sum_b ||b||^(2k))` over all weight matrices W and
    their bias vectors b; scales of normalisation layers count as diagonal matrices. sigma_max is
    u^T W v with vectors u and v that follow W by one power iteration per step. Convolutions count
    as [out, in * height * width]. The form for biases and scales is our reading of the paper. The
    output biases of an MoE layer's experts are left out.
    """

    limits: ClassVar = {"strength": Limit.AT_LEAST_0, "power": Limit.AT_LEAST_1}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of spectral regularisation."""

        strength: float = 1e-4
        """factor of the penalty (our choice)"""
        power: int = 2
        """k"""

    def begin(self) -> None:
        """Begin the power iterations with random vectors."""
        self.vectors = [self._draw(slot) for slot in weight_matrices(self.model)]

    def penalty(self) -> Tensor:
        """The penalty at the present weights; one power iteration on the way."""
        k, slots = self.config.power, weight_matrices(self.model)
        if len(slots) != len(self.vectors):
            self.vectors = [self._draw(slot) for slot in slots]
        terms = []
        for number, slot in enumerate(slots):
            sigma = self._sigma(number, slot)
            terms.append((sigma**k - 1).square())
            if slot.bias is not None and slot.bias.dim() == 1:
                terms.append(slot.bias.square().sum() ** k)
        norms = [m for m in self.model.modules() if isinstance(m, NORMS) and m.weight is not None]
        terms += [(norm.weight.abs().max() ** k - 1).square() for norm in norms]
        return self.config.strength * torch.stack(terms).sum()

    def _sigma(self, number: int, slot: Slot) -> Tensor:
        weight = slot.parameter.flatten(1)
        with torch.no_grad():
            if len(self.vectors[number]) != len(weight):
                self.vectors[number] = self._draw(slot)
            v = F.normalize(weight.T @ self.vectors[number], dim=0)
            u = F.normalize(weight @ v, dim=0)
            self.vectors[number] = u
        return u @ weight @ v

    def _draw(self, slot: Slot) -> Tensor:
        weight = slot.parameter
        return F.normalize(torch.randn(len(weight), generator=self.generator), dim=0).to(weight)

    def state(self) -> dict[str, Any]:
        """The power iterations' vectors."""
        return {"vectors": list(self.vectors)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put them back."""
        device = next(self.model.parameters()).device
        self.vectors = [vector.clone().to(device) for vector in state["vectors"]]


class Parseval(
    Intervention, name="parseval", source="Chung et al. 2024 (arXiv 2412.07224), Section 3"
):
    """Penalises hidden layers whose weight rows are not orthogonal and of one length.

    `strength * sum_l ||W_l W_l^T - scale * I||_F^2` over all layers but the output layers.
    Convolutions count as [out, in * height * width]; an MoE layer's pool as one matrix in and one
    out. Where W has more rows than columns the penalty cannot reach 0; its gradient is that of the
    columns' penalty.
    """

    limits: ClassVar = {"strength": Limit.AT_LEAST_0, "scale": Limit.ABOVE_0}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Parseval regularisation."""

        strength: float = 1e-3
        """factor of the penalty"""
        scale: float = 1.0
        """squared length that rows should have"""

    def penalty(self) -> Tensor | float:
        """The penalty at the present weights."""
        terms = []
        for slot in weight_matrices(self.model, outputs=False):
            weight = slot.parameter.flatten(1)
            target = self.config.scale * torch.eye(len(weight)).to(weight)
            terms.append((weight @ weight.T - target).square().sum())
        return self.config.strength * torch.stack(terms).sum() if terms else 0.0


class EWC(Intervention, name="ewc", source="Kirkpatrick et al. 2017 (arXiv 1612.00796), Eq. 3"):
    """Holds weights that mattered to earlier tasks near their old values (Avalanche's EWCPlugin).

    The penalty is `strength * sum_i F_i (theta_i - theta*_i)^2`, one such sum per earlier task.
    Avalanche's F is the mean over batches of the squared gradient of a batch's mean loss, in
    evaluation mode at the task's end; the paper's strength is half of this one. It is against
    forgetting rather than for plasticity. Weights that growth rewrites in place are held, too.
    """

    limits: ClassVar = {"strength": Limit.FINITE}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of EWC."""

        strength: float = 100.0
        """factor of the penalty (Avalanche's ewc_lambda)"""

    def plugin(self) -> Any:
        """Avalanche's plugin, made resumable."""
        from avalanche.training.plugins import EWCPlugin

        return ResumableEWC(EWCPlugin(self.config.strength))

    def penalty(self) -> Tensor:
        """Refused: its plugin adds the penalty.

        Raises:
            UserError: always; Avalanche's loop does not call it.
        """
        raise UserError(
            "intervention ewc acts in Avalanche's loop alone: use python -m dynmoe.cl, or give its "
            "plugin() to an Avalanche strategy; in a loop of your own take l2-init"
        )

    def without_tasks(self) -> str | None:
        """Its penalty begins with the second task."""
        return "intervention ewc acts at the end of tasks, and there are none here; use l2-init"

    def too_late(self, tasks: float, steps: int) -> str | None:
        """It holds what earlier tasks learnt."""
        return one_task(tasks)


class ResumableEWC:
    """Avalanche plugin around its EWCPlugin, with a state that can be saved.

    Entries that a parameter has gained since a task do not count for it.
    """

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin
        self.after_training_exp = plugin.after_training_exp  # finds out what mattered to the task

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty."""
        parameters = dict(strategy.model.named_parameters())
        for store in self._stores().values():
            for kept in store.values():
                for name, held in kept.items():
                    kept[name] = _fitting(name, held, parameters[name])
        self.plugin.before_backward(strategy, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Old values and importances: task -> parameter name -> tensor."""
        return {
            key: {task: {n: p.data for n, p in kept.items()} for task, kept in store.items()}
            for key, store in self._stores().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        for key, store in self._stores().items():
            store.clear()
            for task, tensors in state[key].items():
                store[task] = {name: _held(name, t.clone()) for name, t in tensors.items()}

    def _stores(self) -> dict[str, Any]:
        return {"values": self.plugin.saved_params, "importances": self.plugin.importances}


def _held(name: str, tensor: Tensor) -> Any:
    """A tensor as Avalanche's plugins keep it."""
    from avalanche.training.utils import ParamData

    return ParamData(name, init_tensor=tensor, device=tensor.device)


def _fitting(name: str, held: Any, parameter: Tensor) -> Any:
    """The same on the parameter's device, with zeros up to its shape.

    Avalanche's own way of adding them warns that it will break.
    """
    if held.shape == parameter.shape and held.data.device == parameter.device:
        return held
    bigger = torch.zeros_like(parameter.detach())
    bigger[tuple(slice(0, n) for n in held.shape)] = held.data.to(parameter)
    return _held(name, bigger)

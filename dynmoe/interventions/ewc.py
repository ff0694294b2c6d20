"""Elastic weight consolidation, by Avalanche."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.registry import PartConfig


class EWC(Intervention, name="ewc", source="Kirkpatrick et al. 2017 (arXiv 1612.00796), Eq. 3"):
    """Holds weights that mattered to earlier tasks near their old values (Avalanche's EWCPlugin).

    The penalty is `strength * sum_i F_i (theta_i - theta*_i)^2`, one such sum per earlier task.
    Avalanche's F is the mean over batches of the squared gradient of a batch's mean loss, in
    evaluation mode at the task's end; the paper's strength is half of this one. It is against
    forgetting rather than for plasticity. Weights that growth rewrites in place are held, too.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of EWC."""

        strength: float = 100.0
        """factor of the penalty (Avalanche's ewc_lambda)"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.strength < float("inf"):
            raise UserError(f"ewc: strength={config.strength} must be at least 0")

    def plugin(self) -> Any:
        """Avalanche's plugin, made resumable."""
        from avalanche.training.plugins import EWCPlugin

        return ResumableEWC(EWCPlugin(self.config.strength))

    def without_tasks(self) -> str | None:
        """Its penalty begins with the second task."""
        return "intervention ewc acts at the end of tasks, and there are none here; use l2-init"


class ResumableEWC:
    """Avalanche plugin around its EWCPlugin, with a state that can be saved.

    Entries that a parameter has gained since a task do not count for it.
    """

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty."""
        parameters = dict(strategy.model.named_parameters())
        for store in (self.plugin.saved_params, self.plugin.importances):
            for kept in store.values():
                for name, held in kept.items():
                    kept[name] = _fitting(name, held, parameters[name])
        self.plugin.before_backward(strategy, **kwargs)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Find out what mattered to the task."""
        self.plugin.after_training_exp(strategy, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Old values and importances: task -> parameter name -> tensor."""
        stores = {"values": self.plugin.saved_params, "importances": self.plugin.importances}
        return {
            key: {task: {n: p.data for n, p in kept.items()} for task, kept in store.items()}
            for key, store in stores.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        stores = {"values": self.plugin.saved_params, "importances": self.plugin.importances}
        for key, store in stores.items():
            store.clear()
            for task, tensors in state[key].items():
                store[task] = {name: _held(name, t.clone()) for name, t in tensors.items()}


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

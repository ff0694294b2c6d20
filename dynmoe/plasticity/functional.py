"""Activations that a network calls as functions, such as `F.relu(x)`, seen while it runs.

Hooks see modules only. A `TorchFunctionMode` sees each torch function that is called, whatever the
control flow around it, so that the network need not be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NAMES = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "softplus", "softsign", "sigmoid", "hardsigmoid", "hardswish", "tanh", "hardtanh",
    "tanhshrink", "softshrink", "hardshrink", "threshold",
)  # fmt: skip
"""The functions whose outputs count as hidden units."""
FUNCTIONS = {
    getattr(space, name + ending): name
    for space in (F, torch, Tensor)
    for name in NAMES
    for ending in ("", "_")
    if hasattr(space, name + ending)
}
"""Function of torch -> its name; those that work in place among them."""


class FunctionalActivations(TorchFunctionMode):
    """While it is active, gives the output of every activation function to `keep`.

    Args:
        keep: (name, output) -> None. The name is that of the module in whose forward pass the
            function is called, and of the function: `block.relu`; `relu` in the model's own.
    """

    def __init__(self, keep: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._keep = keep
        self._running: list[tuple[str, bool]] = []

    def watch(self, name: str, module: nn.Module, counted: bool) -> list[Any]:
        """Follow the forward pass of a module; returns the hooks, which are to be removed.

        Args:
            name: of the module; empty for the model.
            module: one of the model's.
            counted: whether functions within it count; not in modules whose units are seen as such.
        """

        def starts(*_: Any) -> None:
            self._running.append((name, counted))

        def ends(*_: Any) -> None:
            self._running.pop()

        return [
            module.register_forward_pre_hook(starts),
            module.register_forward_hook(ends, always_call=True),
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and note its output if it is an activation of hidden units.

        Outputs without samples, and functions of a parameter alone, such as a learnt temperature,
        are no units.
        """
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in FUNCTIONS and all(counted for _, counted in self._running):
            given = args[0] if args else next(iter(kwargs.values()))
            if output.ndim >= 2 and not isinstance(given, nn.Parameter):
                where = self._running[-1][0] if self._running else ""
                self._keep(f"{where}.{FUNCTIONS[func]}".lstrip("."), output)
        return output

"""What an optimizer keeps of each parameter, entry by entry: its shape, its restart, its growth.

Most state has its parameter's shape. Adafactor's factored second moments lack one axis, or have it
with length 1. Step counts and other scalars belong to the parameter as a whole and are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from dynmoe.moe.draws import Runs, set_entries

Moments = Literal["mean", "zero"]
FACTORED = {
    "row_var": (-1, True),  # torch's Adafactor
    "col_var": (-2, True),
    "exp_avg_sq_row": (-1, False),  # transformers' Adafactor
    "exp_avg_sq_col": (-2, False),
}
"""State key -> the parameter's axis that it averages over, and whether it is kept, of length 1."""
SECOND_MOMENTS = (
    "exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta", "variance",
    *FACTORED,
)  # fmt: skip
"""Running sizes of gradients or updates, by which steps are scaled: Adam and its kin, RMSprop,
Adamax, Adagrad, Adadelta, Adafactor."""


def mean_moments(
    optimizer: Optimizer | None, parameter: Tensor, moments: Moments, rows: int | None = None
) -> dict[str, Tensor]:
    """The second moments that fresh entries start with, by state key; none of them for "zero".

    With 0 under an old step count, Adam's bias correction has long faded, and the first update is
    (1 - b1) / sqrt(1 - b2) = 3.2 learning rates whatever the gradient; the mean over the entries in
    use before the growth (the first `rows`) gives fresh ones the step size of their neighbours.
    Means are scalars on the parameter's device.
    """
    if optimizer is None or moments == "zero":
        return {}
    state = optimizer.state.get(parameter, {})
    found = {key: state[key] for key in SECOND_MOMENTS if isinstance(state.get(key), Tensor)}
    return {key: value[:rows].mean() for key, value in found.items() if value.dim()}


@torch.no_grad()
def neutral_state(
    optimizer: Optimizer | None,
    parameter: Tensor,
    axis: int,
    index: Tensor,
    second: dict[str, Tensor],
    runs: Runs | None = None,
) -> None:
    """Restart the optimizer state of the entries `index` along `axis`.

    First moments (Adam's exp_avg, SGD's momentum) become 0, second moments what `second` says (see
    `mean_moments`), or 0. State that must not be 0 starts as in a new optimizer: Rprop's step sizes
    at the learning rate, Adagrad's sums at least at their initial value, ASGD's averages at the
    parameter itself, which therefore has its new values already. State of a shape that is not
    known is left alone. `runs`: the index as runs, see `set_entries`.
    """
    if optimizer is None or not len(index):
        return
    for key, value, its_axis in entry_state(optimizer, parameter, axis):
        if key == "ax":
            start = parameter.index_select(axis, index.to(parameter.device))
        elif key in second:
            start = second[key]
        else:
            start = torch.as_tensor(_initial(optimizer, parameter, key))
        same_axis = runs if its_axis == axis else None
        set_entries(value, its_axis, index, start.to(value), same_axis)


def entry_state(
    optimizer: Optimizer, parameter: Tensor, axis: int
) -> Iterator[tuple[str, Tensor, int]]:
    """(key, tensor, its axis) of the state that has entries along the parameter's `axis`.

    The parameter has any shape; a tensor of the state may have fewer axes (factored moments).
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        its_axis = _axis_of(key, value, parameter.shape, axis)
        if its_axis is not None:
            yield key, value, its_axis


def replace_parameter(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int
) -> None:
    """Put `new`, which has more entries along `axis`, where `old` stands in the optimizer.

    Its state gets zero entries more. Where the shape of some of it is not known, all of it is
    dropped, and the optimizer makes it again.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    if old not in optimizer.state:
        return
    count, padded = new.shape[axis] - old.shape[axis], {}
    state = optimizer.state.pop(old)
    for key, value in state.items():
        its_axis = _axis_of(key, value, old.shape, axis)
        if its_axis is None and not _is_shared(key, value, old.shape):
            return
        padded[key] = value if its_axis is None else pad(value, its_axis, count)
    optimizer.state[new] = padded


def forget_flat_state(optimizer: Optimizer | None) -> None:
    """Clear the state that an optimizer keeps of all parameters as one vector: that of L-BFGS.

    Its curvature pairs describe a function that growth has changed.
    """
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None


def pad(tensor: Tensor, axis: int, count: int) -> Tensor:
    """A tensor of any shape with `count` zero entries more along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _axis_of(key: str, value: Any, shape: torch.Size, axis: int) -> int | None:
    """The axis of a state tensor that runs along `axis` of a parameter of that shape, or None."""
    if not isinstance(value, Tensor):
        return None
    if value.shape == shape and key not in FACTORED:
        return axis
    if _factored_shape(key, shape) != value.shape:
        return None
    averaged, kept = FACTORED[key][0] % len(shape), FACTORED[key][1]
    if axis == averaged:
        return None
    return axis - (axis > averaged and not kept)


def _is_shared(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether a value says nothing of single entries along an axis that growth adds entries to."""
    if isinstance(value, Tensor):
        return value.numel() == 1 or value.shape == _factored_shape(key, shape)
    return value is None or isinstance(value, bool | int | float | str)


def _factored_shape(key: str, shape: torch.Size) -> torch.Size | None:
    """The shape of a factored statistic of a parameter of that shape; None for other state."""
    if key not in FACTORED or len(shape) < 2:
        return None
    averaged, kept = FACTORED[key][0] % len(shape), FACTORED[key][1]
    return torch.Size([*shape[:averaged], *[1] * kept, *shape[averaged + 1 :]])


def _initial(optimizer: Optimizer, parameter: Tensor, key: str) -> Any:
    """What entries of this state start with in a new optimizer."""
    options = {"step_size": "lr", "sum": "initial_accumulator_value"}
    for group in optimizer.param_groups if key in options else ():
        if any(p is parameter for p in group["params"]):
            return group.get(options[key], 0.0)
    return 0.0

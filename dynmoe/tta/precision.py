"""Learning in half precision, and moving what an adapter keeps beside its model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.tta.entropy import wide

LOST = "remainder"
"""Key of an optimizer's state: what a weight in half precision cannot hold of its value."""


@torch.no_grad()
def take_step(optimizer: Optimizer) -> bool:
    """Step, in float32 for weights in half precision; False, and no step, on bad gradients there.

    Steps smaller than the spacing of such weights add up in the optimizer's state, so that they
    learn as float32 weights do. Other weights are stepped as ever.
    """
    narrow = [p for p in trained_by(optimizer) if p.grad is not None and wide(p) is not p]
    if not all(bool(p.grad.isfinite().all()) for p in narrow):  # type: ignore[union-attr]
        return False
    held = [p.data for p in narrow]
    for parameter in narrow:
        assert parameter.grad is not None
        gradient, parameter.grad = wide(parameter.grad), None
        lost = optimizer.state[parameter].get(LOST, 0.0)
        parameter.data = wide(parameter.data) + lost
        parameter.grad = gradient
    optimizer.step()
    for parameter, weight in zip(narrow, held, strict=True):
        exact, parameter.grad = parameter.data, None
        parameter.data = weight.copy_(exact)
        optimizer.state[parameter][LOST] = exact - wide(weight)
    return True


@torch.no_grad()
def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Restore `state_dict()`, in float32 for weights in half precision, where torch rounds it."""
    optimizer.load_state_dict(saved)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, trained_by(optimizer), strict=True):
        if wide(parameter) is not parameter and index in saved["state"]:
            optimizer.state[parameter] = dict(saved["state"][index])
    move_state(optimizer)


@torch.no_grad()
def move_state(optimizer: Optimizer) -> None:
    """Bring the state to the parameters' devices, in their dtype or float32 if that is wider."""
    for parameter in trained_by(optimizer):
        state = optimizer.state.get(parameter, {})
        if wide(parameter) is parameter:
            state.pop(LOST, None)
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":  # which torch keeps on the CPU
                state[key] = moved(value, parameter)


def trained_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, in the order of its `state_dict()`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def moved(value: Any, like: Tensor) -> Any:
    """The value, its tensors on like's device, floats in like's dtype or float32 if wider."""
    if isinstance(value, Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        return value.to(like.device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: moved(item, like) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, like) for item in value]
    return value


def moved_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on another device: seeded as this one if nothing was drawn, else by a draw."""
    seed = generator.initial_seed()
    unused = torch.Generator(generator.device).manual_seed(seed).get_state()
    if not torch.equal(generator.get_state(), unused):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)

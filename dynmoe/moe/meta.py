"""Meta-learned routers: start from weights that a few steps on a new task's samples make good.

MAML (Finn et al. 2017, arXiv 1703.03400) for routers, as Zhang et al. 2025 (arXiv 2507.11181),
Eq. 18, have it: `theta_T = theta - lr grad L_support(theta)` on the support samples of a task T,
theta being the weights of all routers; what they learn from is the loss at theta_T of other samples
of T, the query. Experts and all else learn from the query loss, as weights that tasks share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.moe.model import collect_aux_losses, finish_step, moe_layers

Samples = tuple[Tensor, Tensor]
"""What the model is given, [N, ...], and what the loss compares its outputs with, [N, ...]"""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> a scalar"""


def adapt_routers(
    model: nn.Module,
    support: Samples,
    loss: Loss,
    *,
    lr: float = 0.1,
    steps: int = 1,
    first_order: bool = True,
) -> dict[str, Tensor]:
    """The weights of the routers after gradient steps on a task's support samples.

    They come by name, in the shapes of the model's own.

    The model stays as it is: `torch.func.functional_call(model, weights, x, tie_weights=False)`
    runs it with them.

    Args:
        model: with MoE layers; in training mode their auxiliary losses are part of the loss.
        support: samples of the task.
        loss: of the task.
        lr: length of the steps (the survey's eta).
        steps: how many.
        first_order: the weights know nothing of the second derivatives on the way to them; False:
            a loss of them can be differentiated through the steps.

    Returns:
        The adapted weights by their names in the model.

    Raises:
        UserError: no router has weights that learn, lr not above 0, or less than one step.
    """
    if not 0 < lr < float("inf") or steps < 1:
        raise UserError(f"meta-learning: lr={lr} must be above 0 and steps={steps} at least 1")
    weights = router_weights(model)
    for _ in range(steps):
        value = _loss(model, weights, support, loss)
        gradients = torch.autograd.grad(
            value, list(weights.values()), create_graph=not first_order, allow_unused=True
        )
        pairs = zip(weights.items(), gradients, strict=True)
        weights = {n: w if g is None else w - lr * g for (n, w), g in pairs}
    return weights


def meta_loss(
    model: nn.Module,
    support: Samples,
    query: Samples,
    loss: Loss,
    *,
    lr: float = 0.1,
    steps: int = 1,
    first_order: bool = False,
) -> Tensor:
    """A task's query loss at its adapted routers, a scalar to be differentiated.

    Its gradient reaches all parameters of the model: those of the routers through the steps of
    `adapt_routers` (MAML), or with `first_order` as if these were constant (FOMAML, Section 5.2).

    Args, Raises: as `adapt_routers`; `query` are other samples of the task.
    """
    weights = adapt_routers(
        model, support, loss, lr=lr, steps=steps, first_order=first_order
    )  # fmt: skip
    return _loss(model, weights, query, loss)


def meta_step(
    model: nn.Module,
    optimizer: Optimizer,
    tasks: Sequence[tuple[Samples, Samples]],
    loss: Loss,
    *,
    lr: float = 0.1,
    steps: int = 1,
    first_order: bool = False,
) -> float:
    """One step of the outer loop, by the mean query loss of some tasks.

    Growth may come between two steps: router rows of new experts are adapted and learn as others.

    Args:
        optimizer: of the model; its gradients are cleared first.
        tasks: (support, query) of each task.
        loss, lr, steps, first_order: as `meta_loss`.

    Returns:
        The mean query loss before the step.

    Raises:
        UserError: as `adapt_routers`, or no task.
    """
    if not tasks:
        raise UserError("meta_step: no task is given; give one or more")
    optimizer.zero_grad()
    total = 0.0
    for support, query in tasks:
        value = meta_loss(
            model, support, query, loss, lr=lr, steps=steps, first_order=first_order
        )  # fmt: skip
        (value / len(tasks)).backward()
        total += float(value.detach())
    optimizer.step()
    finish_step(model)
    return total / len(tasks)


def router_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of all routers that learn, by their names in the model.

    Most are [M, D], a row for each expert; a router may have others, of any shape.

    Raises:
        UserError: there are none.
    """
    own = {id(p) for _, layer in moe_layers(model) for p in layer.router.parameters()}
    found: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if id(p) in own and p.requires_grad
    }
    if not found:
        raise UserError(
            "meta-learning: the model has no router with weights that learn; take one such as topk"
        )
    return found


def _loss(model: nn.Module, weights: dict[str, Tensor], samples: Samples, loss: Loss) -> Tensor:
    """The loss of samples with those router weights, auxiliary losses included."""
    inputs, targets = samples
    # Without tie_weights a router that layers share is swapped once, and comes back whole.
    value = loss(functional_call(model, weights, (inputs,), tie_weights=False), targets)
    return value + sum(collect_aux_losses(model).values())

"""Routers that share a batch out among the experts at once, by linear programming.

In training the scores' sum over all assigned pairs is as large as the experts' capacities allow; in
evaluation, and where samples must not compete, every sample takes its best experts.

Shapes: N samples, M most experts, E active ones.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, library

from dynmoe.errors import UserError
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option, most_samples
from dynmoe.registry import PartConfig


class AssignmentRouter(Router):
    """Base of the two; a selection bias per expert changes nothing.

    Raises:
        UserError: scipy, which solves the programs, is not installed.
    """

    k: int = 1
    normalised = False
    competing = True

    def __init__(self, *size: *RouterSize) -> None:
        if importlib.util.find_spec("scipy") is None:
            raise UserError(f"router {self.name} needs scipy to assign samples: pip install scipy")
        super().__init__(*size)

    def assigned(self, logits: Tensor, inputs: RouterInput, capacity: float, even: bool) -> Tensor:
        """[N, M] bool: min(k, E) experts of each sample, by masked logits [N, M]; see `assign`."""
        if self.training and not self.independent:
            real = inputs.mask
            if real is None:
                real = torch.ones_like(logits[:, 0], dtype=torch.bool)
            return assign(logits.detach(), self.active, real, self.k, capacity, even)
        best = logits.detach().topk(self.k, dim=1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True) & self.active


class BaseLayerRouter(
    AssignmentRouter, name="base", source="Lewis et al. 2021 (arXiv 2103.16716), Section 3"
):
    """BASE: one expert each, all of equal load in training, with gate `sigmoid(x . w_e)`.

    Training solves the balanced assignment of largest total score over the batch, real samples
    only; loads differ by one at most. No loss balances. Evaluation takes the expert of largest
    score. All samples of a batch compete: what the paper does over workers is left out, each
    process shares out its own batch.
    """

    k = 1

    def __init__(self, config: PartConfig, *size: *RouterSize) -> None:
        super().__init__(*size)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to one expert each."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        chosen = self.assigned(logits, inputs, capacity=1.0, even=True)
        return Routing(
            gates=torch.where(chosen, logits.sigmoid(), 0.0),
            logits=logits,
            probabilities=logits.softmax(dim=1),
            active=self.active,
            chosen=chosen,
        )


class MaxScoreRouter(
    AssignmentRouter,
    name="maxscore",
    source="after Dong et al. 2025 (ACL Findings), by Zhang et al. 2025 (arXiv 2507.11181)",
):
    """K experts each within the experts' capacity, at the largest total score; none is dropped.

    MAXSCORE's minimum-cost maximum flow: from every sample K units, through pairs of sample and
    expert that carry one unit each, at the cost of the negative score, into experts that take
    `ceil(capacity K N / E)` samples at most. Gates are the probabilities of the chosen experts,
    renormalised for K >= 2. The paper's SoftTopk, which our sources do not describe, is left out;
    that evaluation knows no capacity is our choice.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the maximum-score router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""
        capacity: float = 1.0
        """most samples of an expert in training, over those of an even share"""

    normalised = True

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "k", 1 <= config.k <= size[2], f"between 1 and {size[2]}")
        enough = 1 <= config.capacity < float("inf")
        check_option(config, "capacity", enough, "at least 1, or samples would be dropped")
        super().__init__(*size)
        self.k, self.capacity = config.k, config.capacity

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to min(K, E) experts each."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        # The logarithm keeps apart what underflows to probability 0.
        scores = logits.log_softmax(dim=1)
        chosen = self.assigned(scores, inputs, self.capacity, even=False)
        return self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=self.k > 1)


OPERATION = "::".join(("dynmoe", "assign"))
"""Its name among torch's operations: library and name."""


@library.custom_op(OPERATION, mutates_args=())
def assign(
    scores: Tensor, active: Tensor, real: Tensor, k: int, capacity: float, even: bool
) -> Tensor:
    """The assignment of largest total score; exact, on the CPU.

    A transport problem: its matrix is totally unimodular, so that the vertices which the simplex
    method finds (`scipy.optimize.linprog`) are whole numbers.

    Args:
        scores: [N, M]. active: [M] bool, experts that exist. real: [N] bool, False for padding.
        k: experts of each real sample, or all E if that is fewer.
        capacity: an expert takes at most `ceil(capacity k N / E)` of the N real samples; >= 1.
        even: and at least `floor(k N / E)`.

    Returns:
        [N, M] bool.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    known = scores[real][:, active].double().cpu().numpy()
    samples, experts = known.shape
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if not known.size:
        return chosen
    known = np.nan_to_num(known)
    known = known / max(np.abs(known).max(), np.finfo(float).tiny)
    each = min(k, experts)
    most = min(int(most_samples(capacity, torch.tensor(each * samples), experts)), samples)
    of_sample = sparse.kron(sparse.eye(samples), np.ones((1, experts)), format="csr")
    of_expert = sparse.kron(np.ones((1, samples)), sparse.eye(experts), format="csr")
    limits, bounds = [of_expert], [np.full(experts, most)]
    if even:
        least = each * samples // experts
        limits, bounds = [of_expert, -of_expert], [*bounds, np.full(experts, -least)]
    found = linprog(
        -known.ravel(), sparse.vstack(limits), np.concatenate(bounds), of_sample,
        np.full(samples, each), bounds=(0, 1), method="highs-ds",
    )  # fmt: skip
    pairs = torch.from_numpy(found.x.reshape(samples, experts) > 0.5).to(scores.device)
    rows = chosen[real]
    rows[:, active] = pairs
    chosen[real] = rows
    return chosen


@assign.register_fake
def _(scores: Tensor, active: Tensor, real: Tensor, k: int, capacity: float, even: bool) -> Tensor:
    """What a compiler is told of the result."""
    return torch.empty_like(scores, dtype=torch.bool)

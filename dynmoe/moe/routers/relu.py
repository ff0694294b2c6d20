"""ReMoE: ReLU gates, kept sparse by an L1 loss whose weight adapts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.passes import Passes, new_pass
from dynmoe.moe.processes import sum_over_processes
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig

LOWEST, HIGHEST = 1e-12, 1e6
"""bounds of the loss's weight: it multiplies, and could never leave 0 or infinity"""


class ReLURouter(Router, name="relu", source="Wang et al. 2024 (arXiv 2412.14711), Section 3"):
    """Gates `ReLU(x W^T)`: each sample uses the experts whose score is positive, few on average.

    ReMoE, Wang et al. 2024 (arXiv 2412.14711), Section 3. In training mode the router adds a loss
    `sparsity` of its own, `strength * mean_t sum_e f_e gate_te`, where `f_e = E / k * (share of
    samples that use e)` has no gradient and balances the load. After each optimizer step, strength
    is multiplied by `alpha ** sign((1 - k / E) - S)`, S being the share of zero gates among the
    active experts in the step's passes, over all processes: gates that are too dense raise it. The
    target follows E as the layer grows.

    A sample may use no expert at all; its output then is that of the shared expert, or 0. Scores
    that are never positive have no gradient. Ours: strength is kept between 1e-12 and 1e6, every
    layer has its own, and a shift s of the logits multiplies the gate by exp(s), so that copies of
    an expert share its gate.

    Attributes:
        strength: buffer, scalar, the present weight of the loss (the paper's lambda).
        noted: buffer [2] int64, real samples of this optimizer step and the experts that they use;
            not saved.
    """

    normalised = False
    strength: Tensor
    noted: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the ReLU router."""

        k: float = 2.0
        """experts that a sample shall use, on average; all of them while fewer exist"""
        strength: float = 1e-8
        """the loss's weight at the start (the paper's lambda_0)"""
        alpha: float = 1.2
        """factor of each change of that weight"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if config.k <= 0:
            raise UserError(f"relu router: k={config.k} must be above 0")
        if not LOWEST <= config.strength <= HIGHEST:
            raise UserError(
                f"relu router: strength={config.strength} must be between {LOWEST} and {HIGHEST}"
            )
        if config.alpha < 1:
            raise UserError(f"relu router: alpha={config.alpha} must be at least 1")
        super().__init__(dim, num_experts, max_experts, generator)
        self.mean_used = config.k
        self.alpha = config.alpha
        self.initial_strength = config.strength
        self.register_buffer("strength", torch.tensor(config.strength))
        self.register_buffer("noted", torch.zeros(2, dtype=torch.long), persistent=False)
        self._passes = Passes()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, the loss's weight included."""
        super().reset_parameters(generator)
        self.strength.fill_(self.initial_strength)
        self._forget()

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]; probabilities are shares of the gates, uniform where all are 0."""
        scores = F.linear(inputs.x, self.weight)
        gates = torch.where(self.active, scores.relu(), 0.0) * self.logit_shift.exp()
        total = gates.sum(dim=1, keepdim=True)
        uniform = self.active.to(gates.dtype) / self.active.sum()
        some = total > 0
        routing = Routing(
            gates=gates,
            logits=self.mask(scores),
            probabilities=torch.where(some, gates / torch.where(some, total, 1.0), uniform),
            active=self.active,
            chosen=gates > 0,
        ).without_padding(inputs.mask)
        if self.training:
            routing.losses["sparsity"] = self._sparsity(routing)
            if self._passes.learns(new_pass()):
                self._note(routing)
        return routing

    @torch.no_grad()
    def finish_step(self) -> None:
        """Adapt the strength to what the step's passes used."""
        samples, used = sum_over_processes(self.noted)
        experts = self.active.sum()
        target = (1 - self.mean_used / experts).clamp(min=0.0)
        zero = 1 - used / (samples * experts).clamp(min=1)
        sign = torch.where(samples > 0, (target - zero).sign(), 0.0)
        self.strength.copy_((self.strength * self.alpha**sign).clamp(LOWEST, HIGHEST))
        self._forget()

    def _forget(self) -> None:
        self.noted.zero_()
        self._passes.clear()

    @torch.no_grad()
    def _note(self, routing: Routing) -> None:
        used = routing.picks() > 0
        self.noted[0] += len(used) if routing.mask is None else routing.mask.sum()
        self.noted[1] += used.sum()

    def _sparsity(self, routing: Routing) -> Tensor:
        """The batch's loss at the present strength."""
        experts = self.active.sum()
        use = routing.mean(routing.picks()).detach()  # [M]
        loss = (experts / self.mean_used * use * routing.mean(routing.gates)).sum()
        return self.strength.clone() * loss

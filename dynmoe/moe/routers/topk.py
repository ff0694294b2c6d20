"""Sparse routers: each sample uses the few experts of largest score, or of positive score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import Noise, draw_entries, every
from dynmoe.moe.passes import Passes, new_pass, sum_over_processes
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option
from dynmoe.registry import PartConfig


class TopKRouter(Router, name="topk", source="Shazeer et al. 2017 (arXiv 1701.06538), Section 2.1"):
    """The K experts with the largest linear score, weighted by their softmax probability.

    Without noise. Chosen probabilities are renormalised for K >= 2 only: a renormalised single gate
    is 1 whatever the logits, and its router gradient exactly zero.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the top-k router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "k", 1 <= config.k <= size[2], f"between 1 and {size[2]}")
        super().__init__(*size)
        self.k = config.k

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to its min(K, E) best experts."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        probabilities = logits.softmax(dim=1)
        chosen = self.choose(logits, self.k)  # probabilities may tie at 0 in float32
        return self.sparse(logits, probabilities, chosen, renormalise=self.k > 1)


class NoisyTopKRouter(
    Router, name="noisy-topk", source="Shazeer et al. 2017 (arXiv 1701.06538), Section 2.1, App. A"
):
    """The K experts of largest noisy score `x W^T + N(0, 1) softplus(x W_noise^T)`.

    Eqs. 3-5; also Zhang et al. 2025 (arXiv 2507.11181), Eqs. 2-4. Noise is added in training mode
    only. As in the plain top-k router, chosen probabilities are renormalised for K >= 2 only.

    Attributes:
        noise_weight: Parameter [M, D], zero at first (Shazeer et al., App. A), so that every score
            starts with noise of softplus(0) = 0.69. Rows of later experts are drawn as all
            rows are (our choice). None with fixed noise.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the noisy top-k router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""
        noise: Literal["learned", "fixed"] = "learned"
        """learned: the noise's scale is softplus(x W_noise^T); fixed: it is sigma"""
        sigma: float = 1.0
        """standard deviation of fixed noise"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, _, most, generator = size
        check_option(config, "k", 1 <= config.k <= most, f"between 1 and {most}")
        check_option(config, "sigma", config.sigma > 0, "above 0; topk has no noise")
        super().__init__(*size)
        self.k, self.sigma = config.k, config.sigma
        learned = config.noise == "learned"
        self.noise_weight = nn.Parameter(torch.zeros(most, dim)) if learned else None
        self.noise = Noise(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start; rows of the noise are 0 there, so none are drawn."""
        self.reset_buffers()
        draw_entries(self.weight, 0, every(self.weight), self.weight.shape[1] ** -0.5, generator)
        if self.noise_weight is not None:
            self.noise_weight.zero_()
        self.noise.reset_parameters(generator)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to the min(K, E) experts of largest noisy score; fills `load`."""
        clean = F.linear(inputs.x, self.weight)
        if self.noise_weight is None:
            scale = torch.full_like(clean, self.sigma)
        else:
            scale = F.softplus(F.linear(inputs.x, self.noise_weight))
        noisy = clean
        if self.training:
            noisy = clean + self.noise.normal(clean) * scale
        logits = self.mask(noisy)
        chosen = self.choose(logits, self.k)
        routing = self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=self.k > 1)
        routing.load = self._load(clean + self.logit_shift, scale, logits, chosen)
        return routing

    def _load(self, clean: Tensor, scale: Tensor, noisy: Tensor, chosen: Tensor) -> Tensor:
        """[N, M] chance that an expert is chosen if its noise alone is drawn again.

        App. A, Eqs. 8-10: `Phi((clean_i - kth_excluding(noisy, k, i)) / scale_i)`, with the
        selection bias. 1 while no more than K experts exist, which all are chosen then.
        """
        clean, noisy = clean + self.selection_bias, noisy + self.selection_bias
        best = noisy.topk(min(self.k + 1, noisy.shape[1]), dim=1).values
        # The k-th best of the others: the next one down for an expert that is chosen itself.
        threshold = torch.where(chosen, best[:, -1:], best[:, self.k - 1 : self.k])
        threshold = threshold.masked_fill(threshold == -torch.inf, 0.0)
        distance = (clean - threshold) / scale.clamp_min(torch.finfo(scale.dtype).eps)
        load = torch.where(self.active.sum() <= self.k, 1.0, torch.special.ndtr(distance))
        return torch.where(self.active, load, 0.0)


class VaryingRouter(Router):
    """Base of the routers that use the best experts, as many as the sample asks for."""

    steerable = True

    def ranking(self, logits: Tensor) -> Tensor:
        """[N, M] experts by falling logit [N, M] plus selection bias, of equals the older first."""
        biased = logits.detach() + self.selection_bias
        return biased.argsort(dim=1, descending=True, stable=True)

    def sparse_varying(
        self, logits: Tensor, probabilities: Tensor, chosen: Tensor, renormalise: bool
    ) -> Routing:
        """As `sparse`, of [N, M] each; an expert that is alone keeps its probability as gate."""
        routing = self.sparse(logits, probabilities, chosen, renormalise)
        alone = torch.where(chosen, probabilities, 0.0)
        routing.gates = torch.where(routing.used() == 1, alone, routing.gates)
        return routing


class TopPRouter(
    VaryingRouter, name="top-p", source="Huang et al. 2024 (arXiv 2403.07652), Section 2"
):
    """The fewest experts whose probabilities add up to p, the most probable first.

    Hard samples use more experts. At least one is used; of equally probable experts the older one
    comes first.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the top-p router."""

        p: float = 0.4
        """probability that the chosen experts must reach together"""
        renormalise: bool = True
        """divide the gates of a sample by their sum where it uses two experts or more; one alone
        keeps its probability, or the router would get no gradient there (our choice)"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "p", 0 < config.p <= 1, "above 0, at most 1")
        super().__init__(*size)
        self.p = config.p
        self.renormalise = config.renormalise

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]; the selection bias counts in the order, not in the probabilities."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        probabilities = logits.softmax(dim=1)
        order = self.ranking(logits)
        ordered = probabilities.detach().gather(1, order)
        before = ordered.cumsum(dim=1) - ordered
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, before < self.p)
        return self.sparse_varying(logits, probabilities, chosen & self.active, self.renormalise)


class NormRouter(VaryingRouter, name="norm", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 17"):
    """The k(x) best experts, `k(x) = min(k_max, floor(tau ||x||))`, at least one.

    The least of one is our choice. Gates are softmax probabilities, renormalised over the chosen
    where they are two or more: one gate alone would be 1 whatever the logits, and the router's
    gradient exactly zero.
    """

    k: int

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the norm router."""

        k_max: int = 2
        """most experts per sample; all of them while fewer exist"""
        tau: float = 1.0
        """experts per unit of Euclidean length of the sample"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        most = size[2]
        check_option(config, "k_max", 1 <= config.k_max <= most, f"between 1 and {most}")
        check_option(config, "tau", config.tau > 0, "above 0")
        super().__init__(*size)
        self.k = config.k_max
        self.tau = config.tau

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to its min(k(x), E) best experts."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        probabilities = logits.softmax(dim=1)
        count = (self.tau * inputs.x.detach().norm(dim=1, keepdim=True)).floor().clamp(1, self.k)
        chosen = (self.ranking(logits).argsort(dim=1) < count) & self.active
        return self.sparse_varying(logits, probabilities, chosen, renormalise=True)


class CostAwareRouter(
    Router, name="cost-aware", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 11"
):
    """The expert of largest score minus lambda times its cost, with its probability as gate.

    Our choices: an expert's cost is its number of hidden units relative to the mean of the active
    experts, and the gate is the softmax of the scores alone. It differs from top-1 only where
    experts differ in size.
    """

    k = 1
    steerable = True
    uses_sizes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the cost-aware router."""

        cost_weight: float = 0.1
        """lambda: what the score of an expert of mean size is lowered by"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "cost_weight", config.cost_weight >= 0, "at least 0")
        super().__init__(*size)
        self.cost_weight = config.cost_weight

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] by scores and `inputs.sizes` [M].

        Raises:
            UserError: the experts' sizes are not known.
        """
        if inputs.sizes is None:
            raise UserError(
                "cost-aware router: the experts have no sizes; choose a bank of hidden units, such "
                "as pool"
            )
        logits = self.mask(F.linear(inputs.x, self.weight))
        sizes = torch.where(self.active, inputs.sizes, 0).to(logits.dtype)
        cost = sizes * self.active.sum() / sizes.sum()
        chosen = self.choose(logits - self.cost_weight * cost, 1)
        return self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=False)


LOWEST, HIGHEST = 1e-12, 1e6
"""bounds of the loss's weight: it multiplies, and could never leave 0 or infinity"""


class ReLURouter(Router, name="relu", source="Wang et al. 2024 (arXiv 2412.14711), Section 3"):
    """Gates `ReLU(x W^T)`: each sample uses the experts whose score is positive, few on average.

    ReMoE. In training mode the router adds a loss `sparsity` of its own, `strength * mean_t sum_e
    f_e gate_te`, where `f_e = E / k * (share of samples that use e)` has no gradient and balances
    the load. After each optimizer step, strength is multiplied by `alpha ** sign((1 - k / E) - S)`,
    S being the share of zero gates among the active experts in the step's passes, over all
    processes: gates that are too dense raise it. The target follows E as the layer grows.

    A sample may use no expert at all; its output then is that of the shared expert, or 0. Scores
    that are never positive have no gradient. Ours: strength is kept between 1e-12 and 1e6, every
    layer has its own, and a shift s of the logits multiplies the gate by exp(s), so that copies of
    an expert share its gate.

    Attributes:
        strength: buffer, scalar, the present weight of the loss (the paper's lambda).
        noted: [2] int64, real samples of this optimizer step and the experts that they use; not
            saved.
    """

    normalised = False
    step_notes = ("noted",)
    strength: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the ReLU router."""

        k: float = 2.0
        """experts that a sample shall use, on average; all of them while fewer exist"""
        strength: float = 1e-8
        """the loss's weight at the start (the paper's lambda_0)"""
        alpha: float = 1.2
        """factor of each change of that weight"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "k", config.k > 0, "above 0")
        within = LOWEST <= config.strength <= HIGHEST
        check_option(config, "strength", within, f"between {LOWEST} and {HIGHEST}")
        check_option(config, "alpha", config.alpha >= 1, "at least 1")
        super().__init__(*size)
        self.mean_used, self.alpha = config.k, config.alpha
        self.initial_strength = config.strength
        self.register_buffer("strength", torch.tensor(config.strength))
        self.noted = torch.zeros(2, dtype=torch.long)
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
        self.notes_to(self.active.device)
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
        self.notes_to(self.active.device)
        used = routing.picks() > 0
        self.noted[0] += len(used) if routing.mask is None else routing.mask.sum()
        self.noted[1] += used.sum()

    def _sparsity(self, routing: Routing) -> Tensor:
        """The batch's loss at the present strength."""
        experts = self.active.sum()
        use = routing.mean(routing.picks()).detach()  # [M]
        loss = (experts / self.mean_used * use * routing.mean(routing.gates)).sum()
        return self.strength.clone() * loss

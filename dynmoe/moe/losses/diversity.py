"""Losses that keep experts, their weights, features or router rows different.

Shapes: M most experts, N samples, H hidden units, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank, UnitBank
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.experts.rows import NetworkBank
from dynmoe.moe.loss import AuxLoss, LossInput
from dynmoe.moe.passes import batch_sum, one_batch, sum_over_processes
from dynmoe.moe.router import check_option


class OrthogonalLoss(
    AuxLoss, name="orthogonal", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 7"
):
    """Sum over ordered pairs of experts of their weights' squared cosine; 0 for orthogonal experts.

    Banks of rows: the cosine of the experts' flattened rows, Eq. 7 itself. Hidden units have no
    order and experts may differ in size, so for pools of units (our choice) W_i holds the incoming
    weights of expert i's units, a row per unit, and a pair counts
    `||W_i W_j^T||_F^2 / (||W_i||_F^2 ||W_j||_F^2)`: Eq. 7 for one unit each, never above 1, the
    same in every order of the units. 0 with one active expert.
    """

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the bank's weights; samples have no part in it."""
        active = inputs.routing.active
        if isinstance(inputs.bank, UnitBank | BottleneckBank):
            overlaps = unit_overlaps(inputs.bank, len(active))
        else:
            rows = torch.cat([p.flatten(1) for p in inputs.bank.expert_rows()], dim=1)
            overlaps = row_overlaps(torch.where(active.unsqueeze(1), rows, 0.0))
        return torch.where(active_pairs(active), overlaps, 0.0).sum()


def row_overlaps(rows: Tensor) -> Tensor:
    """Squared cosines [M, M] of rows [M, F]; 0 where a row is 0."""
    rows = _unit(rows)
    return (rows @ rows.T).square()


def unit_overlaps(bank: UnitBank | BottleneckBank, experts: int) -> Tensor:
    """Overlaps [M, M] of the experts' incoming weights, as `OrthogonalLoss` defines them.

    Of bottlenecked experts those are the weights of their first layers.
    """
    if isinstance(bank, BottleneckBank):
        weights, segment = bank.maps(bank.weights).w1, bank.first_segment
    else:
        weights, segment = torch.cat(unit_inputs(bank), dim=1), bank.segment  # [H, F], [H]
    owner = F.one_hot(segment, experts).to(weights.dtype)  # [H, M]
    norms = _norm(owner.T @ weights.square().sum(dim=1))
    rows = weights / norms[segment].unsqueeze(1)
    return owner.T @ (rows @ rows.T).square() @ owner


def _norm(squares: Tensor) -> Tensor:
    """Square roots, with a finite gradient at 0."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _unit(x: Tensor) -> Tensor:
    """Vectors along the last axis divided by their length; 0 stays 0, with a finite gradient."""
    return x / _norm(x.square().sum(dim=-1, keepdim=True))


class ParsevalLoss(
    AuxLoss, name="parseval", source="Chung et al. 2024 (arXiv 2412.07224), Section 3"
):
    """Mean over active experts of `||W_e W_e^T - s I||_F^2`, which keeps learning well-conditioned.

    W_e [H_e, D_in] are the weights into expert e's hidden units, one term for each such matrix; for
    banks without units every weight matrix of the expert but its output layer's. An expert with
    more rows than columns cannot reach 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of Parseval regularisation."""

        weight: float = 0.001
        """factor of the loss in the training objective"""
        scale: float = 1.0
        """s: squared length that rows are pulled to"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        check_option(config, "scale", config.scale > 0, "above 0")
        self.scale = config.scale

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the bank's weights; samples have no part in it.

        Raises:
            UserError: the bank has no weight matrices.
        """
        bank, active = inputs.bank, inputs.routing.active
        if isinstance(bank, BottleneckBank):
            terms = self._maps(bank)
        else:
            terms = self._units(bank) if isinstance(bank, UnitBank) else self._rows(bank, active)
        if not terms:
            raise UserError(
                f"parseval loss: bank {bank.name!r} has no weight matrices to keep even"
            )
        return torch.stack(terms).sum() / active.sum()

    def _units(self, bank: UnitBank) -> list[Tensor]:
        """One sum over all experts for each matrix of a pool of units."""
        same = bank.segment.unsqueeze(1) == bank.segment  # units of one expert
        terms = []
        for weights in unit_inputs(bank):
            products = torch.where(same, weights @ weights.T, 0.0)
            terms.append((products - self._target(products)).square().sum())
        return terms

    def _maps(self, bank: BottleneckBank) -> list[Tensor]:
        """A term for each matrix of each bottlenecked expert but its last."""
        terms = []
        for w1, _, w2, _, w3, *_ in bank.maps(bank.weights).by_expert():
            products = [w @ w.T for w in (w1, w2, w3)]
            terms += [(p - self._target(p)).square().sum() for p in products]
        return terms

    def _rows(self, bank: ExpertBank, active: Tensor) -> list[Tensor]:
        """One sum over all experts for each stack of matrices [M, rows, columns]."""
        terms, last = [], {id(p) for p in bank.output_rows()}
        for stack in bank.expert_rows():
            if stack.dim() < 3 or id(stack) in last:
                continue
            weights = torch.where(active.view(-1, 1, 1), stack.flatten(2), 0.0)
            gaps = weights @ weights.mT
            gaps = torch.where(active.view(-1, 1, 1), gaps - self._target(gaps), 0.0)
            terms.append(gaps.square().sum())
        return terms

    def _target(self, products: Tensor) -> Tensor:
        """s I of the last two axes of `products`."""
        return torch.diag(products.new_full(products.shape[-1:], self.scale))


Form = Literal["euclidean", "cosine", "kl"]


class PrototypeDiversity(
    AuxLoss, name="prototype-diversity", source="ours; its euclidean form is Eq. 9 of MoE²"
):
    """Mean similarity of two active experts' router rows v, 1 for equal rows.

    euclidean: `exp(-||v_k - v_j||_2)`, Eq. 9. cosine: `max(0, cos(v_k, v_j))`; without the bound
    two heaps of equal rows that point apart would count as diverse. kl: `exp(-J)`, J the mean of
    both KL divergences between softmax(v_k) and softmax(v_j), nats. The latter two are our choice.
    0 with one active expert. Where rows are exactly equal, euclidean and kl have no gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of prototype diversity."""

        form: Form = "euclidean"
        """how similarity is measured"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        forms = get_args(Form)
        check_option(config, "form", config.form in forms, f"one of {', '.join(forms)}")
        self.form = config.form

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the router's weights; samples have no part in it."""
        active = inputs.routing.active
        rows = torch.where(active.unsqueeze(1), inputs.router.weight, 0.0)
        return mean_over_pairs(self._similarity(rows), active)

    def _similarity(self, rows: Tensor) -> Tensor:
        """Similarity [M, M] of rows [M, D]."""
        if self.form == "cosine":
            rows = F.normalize(rows, dim=1)
            return (rows @ rows.T).clamp_min(0.0)
        if self.form == "kl":
            log_p = rows.log_softmax(dim=1)
            p = log_p.exp()
            cross = p @ log_p.T
            divergence = cross.diagonal().unsqueeze(1) - cross
            return torch.exp(-0.5 * (divergence + divergence.T))
        return torch.exp(-torch.linalg.vector_norm(rows.unsqueeze(1) - rows, dim=2))


class GramSchmidtLoss(
    AuxLoss, name="gram-schmidt", source="ours, after Liu et al. 2023 (arXiv 2310.09762)"
):
    """How much of each expert's output lies in the span of the experts before it, 0 to 1.

    Mean over samples and over experts but the first of `|P y|^2 / |y|^2`, P the projection on the
    span: 0 where the outputs are orthogonal, 1 where every expert repeats its predecessors. The
    papers (also Hendawy et al. 2024, arXiv 2311.11385) force orthogonality by construction; the
    loss is our choice. From three experts on it depends on their order, and with more experts than
    outputs it cannot reach 0. 0 with one active expert. Needs every expert's output for every
    sample, also where the router is sparse.
    """

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        outputs, active = active_outputs(inputs)
        cosines = torch.einsum("ind,jnd->nij", _unit(outputs), gram_schmidt(outputs, active))
        inside = cosines.square().tril(diagonal=-1).sum(dim=(1, 2))
        return inputs.routing.mean(inside) / (active.sum() - 1).clamp(min=1)


def gram_schmidt(outputs: Tensor, active: Tensor) -> Tensor:
    """Outputs [M, N, D] made orthonormal along the experts, for each sample: [M, N, D].

    An expert whose output lies in the span of its predecessors (all but the square root of the
    machine precision of it), is 0 or is not active [M] gets 0. Each step runs twice, which keeps
    the result orthogonal in float32 also for nearly dependent outputs.
    """
    precision = torch.finfo(outputs.dtype).eps
    outputs = _unit(torch.where(active.view(-1, 1, 1), outputs, 0.0))
    basis = torch.zeros_like(outputs[:0])
    for output in outputs:
        for _ in range(2):
            along = torch.einsum("nd,mnd->mn", output, basis)
            output = output - torch.einsum("mn,mnd->nd", along, basis)
        square = output.square().sum(dim=1, keepdim=True)
        output = torch.where(square > precision, output / square.clamp_min(precision).sqrt(), 0.0)
        basis = torch.cat([basis, output.unsqueeze(0)])
    return basis


class DistillationLoss(
    AuxLoss, name="distillation", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 8"
):
    """`KL(E_i(x) || E_j(x))`, mean over ordered pairs of active experts and over samples, nats.

    E_i(x) is the softmax of expert i's output features over a temperature, with no factor
    temperature^2. Eq. 8 sums over the pairs; the mean (our choice) does not grow with the experts.
    0 with one active expert. Needs every expert's output for every sample, also where the router is
    sparse.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of mutual distillation."""

        temperature: float = 1.0
        """divides the outputs; larger is softer"""
        detach_target: bool = False
        """no gradient through E_i, the teacher of a pair; else both experts move"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        check_option(config, "temperature", config.temperature > 0, "above 0")
        self.temperature, self.detach_target = config.temperature, config.detach_target

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch."""
        outputs, active = active_outputs(inputs)
        log_p = (outputs / self.temperature).log_softmax(dim=2)
        teacher = log_p.detach() if self.detach_target else log_p
        p = teacher.exp()
        own = (p * teacher).sum(dim=2).T  # [N, M]
        divergence = own.unsqueeze(2) - torch.einsum("inf,jnf->nij", p, log_p)
        return inputs.routing.mean(mean_over_pairs(divergence, active))


def active_pairs(active: Tensor) -> Tensor:
    """[M, M] bool: ordered pairs of two different active experts, from active [M]."""
    same = torch.eye(len(active), dtype=torch.bool, device=active.device)
    return active & active.unsqueeze(1) & ~same


def mean_over_pairs(values: Tensor, active: Tensor) -> Tensor:
    """Mean of values [..., M, M] over ordered pairs of active experts: `[...]`; 0 for one."""
    pairs = active_pairs(active)
    return torch.where(pairs, values, 0.0).sum(dim=(-2, -1)) / pairs.sum().clamp(min=1)


def active_outputs(inputs: LossInput) -> tuple[Tensor, Tensor]:
    """Outputs [M, N, F] of every expert for every sample, 0 for reserved ones; and active [M]."""
    outputs = inputs.bank.expert_outputs(inputs.x).flatten(2)
    active = inputs.routing.active[: len(outputs)]
    return torch.where(active.view(-1, 1, 1), outputs, 0.0), active


def unit_inputs(bank: UnitBank) -> list[Tensor]:
    """Matrices [H, F] of the weights through which inputs reach hidden units; no biases."""
    out = bank.output_weight()
    entries = [(getattr(bank, name), axis) for name, axis in bank.unit_axes()]
    return [p.movedim(axis, 0).flatten(1) for p, axis in entries if p is not out and p.dim() > 1]


class SphereLoss(AuxLoss, name="sphere", source="Luo et al. 2026 (arXiv 2605.04712), SPHERE"):
    """Spread of the eigenvalues of the experts' router-weighted features; 0 if all are alike.

    `A = Phi^T Phi / N` [m, m] is the Gram matrix of the features; row n of Phi [N, m] joins the
    hidden units of every expert, each times the expert's gate for sample n. With c = tr(A) / m, the
    mean of A's eigenvalues, the loss is
        relative: `||A / c - I||_F^2 / m`, the eigenvalues' squared coefficient of variation, 0..m-1
        paper:    `||A - c I||_F^2`

    The paper's (known to us from its abstract and summaries of it): the second form; one penalty
    for all experts together, so that two experts with the same features count as a loss; on the
    last hidden layer of the experts only.

    Our choices: the first form. The second goes with the fourth power of features and gates, by
    orders of magnitude within a run and with each growth, so that no fixed weight serves it (the
    authors' published scripts set its gradient to a share of the task's). The weight. Every
    position of an image or sequence is a sample. Each MoE layer has a term of its own, so that
    `--network.place all` gives as many as blocks. The loss needs every hidden unit for every
    sample, also where the router is sparse, and m^2 numbers; with N < m it cannot reach 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AuxLoss.Config):
        """Options of SPHERE."""

        weight: float = 0.001
        """factor of the loss in the training objective"""
        form: Literal["relative", "paper"] = "relative"
        """relative: whatever the scale of the features; paper: as it stands there"""

    def __init__(self, config: Config, max_experts: int) -> None:
        super().__init__(config, max_experts)
        check_option(config, "form", config.form in ("relative", "paper"), "relative or paper")
        self.form = config.form

    def forward(self, inputs: LossInput) -> Tensor:
        """The loss of the batch; a UserError for experts without hidden layer."""
        features, living = router_weighted_features(inputs)
        mask = inputs.routing.mask
        own = features.new_tensor(len(features)) if mask is None else mask.sum()
        samples = (sum_over_processes(own) if one_batch() else own).clamp(min=1)
        positions = max(features.shape[2], 1)
        products = torch.einsum("nmp,nkp->mk", features, features)
        gram = batch_sum(products) / (samples * positions)
        mean = gram.trace() / living.sum()
        gaps = gram - torch.diag(mean * living)
        if self.form == "paper":
            return gaps.square().sum()
        mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)  # features may all be 0
        return (gaps / mean).square().sum() / living.sum()


def router_weighted_features(inputs: LossInput) -> tuple[Tensor, Tensor]:
    """Features [N, m, P] at each sample's P positions, and which of them [m] active experts own.

    Features of reserved experts and of padding are 0.

    Raises:
        UserError: the bank's experts have no hidden layer.
    """
    bank, gates = inputs.bank, inputs.routing.gates
    if isinstance(bank, UnitBank | BottleneckBank):
        hidden = bank.hidden(inputs.x)
        weights = gates[:, bank.segment]
        living = torch.ones_like(bank.segment, dtype=torch.bool)
    elif isinstance(bank, NetworkBank):
        hidden = bank.last_hidden(inputs.x)  # [M, N, F]
        hidden = torch.where(inputs.routing.active.view(-1, 1, 1), hidden, 0.0)
        width = hidden.shape[2]
        hidden = hidden.movedim(0, 1).flatten(1)
        weights = gates.repeat_interleave(width, dim=1)
        living = inputs.routing.active.repeat_interleave(width)
    else:
        raise UserError(f"sphere loss: experts of bank {bank.name!r} have no hidden layer")
    hidden = hidden.flatten(2) if hidden.dim() > 2 else hidden.unsqueeze(2)
    return hidden * weights.unsqueeze(2), living

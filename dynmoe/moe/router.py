"""The router contract: samples in, a `Routing` record out, and rows for experts to come.

A router owns one row of parameters per expert the layer may ever hold (M rows), so that growth
writes into existing tensors. Rows of experts that do not exist yet are masked. Banks, losses and
diagnostics read the record.

Shapes: N samples (or tokens), M most experts the layer can hold, E active experts, S slots.
Everything is M wide; experts that do not exist yet have gate 0 and logit -inf.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_entries, every
from dynmoe.moe.passes import StepNotes, batch_sum, one_batch, sum_over_processes
from dynmoe.registry import Part, PartConfig


@dataclass
class RouterInput:
    """What a router may read. Most read `x` alone."""

    x: Tensor
    """[N, D] samples or tokens"""
    mask: Tensor | None = None
    """[N] bool, False for padding; None: all are real"""
    context: Tensor | None = None
    """[N, ...] side information (labels, token ids, domain or task codes), or None"""
    groups: int = 1
    """the N rows are this many sequences of equal length, for routers whose tokens compete"""
    sizes: Tensor | None = None
    """[M] hidden units of each expert, for routers that ask for them (`uses_sizes`)"""


@dataclass
class Slots:
    """Soft-MoE's exchange of tokens for slots, T tokens and S slots in each of G groups."""

    dispatch: Tensor
    """[G, T, S] weight of each token in each slot's input"""
    combine: Tensor
    """[G, T, S] weight of each slot's output in each token's"""
    owner: Tensor
    """[S] the expert that each slot belongs to"""
    used: Tensor
    """[S] bool, whether that expert exists"""


@dataclass
class Routing:
    """One routing decision.

    Dense routers leave `chosen` empty: every active expert is used, weighted by `gates`. Sparse
    routers fill it; then `gates` is exactly 0 wherever `chosen` is False.
    """

    gates: Tensor
    """[N, M] weight of each expert for each sample, >= 0"""
    logits: Tensor
    """[N, M] scores before normalisation; -inf for experts that do not exist yet"""
    probabilities: Tensor
    """[N, M] scores normalised over the active experts; equals `gates` for dense routers"""
    active: Tensor
    """[M] bool, which experts exist"""
    chosen: Tensor | None = None
    """[N, M] bool, the experts that each sample uses, or None for dense routing"""
    mask: Tensor | None = None
    """[N] bool, False for padding, whose gates are 0; None: all are real"""
    load: Tensor | None = None
    """[N, M] chance that a noisy router picks each expert, differentiable in the logits"""
    slots: Slots | None = None
    """set by slot routers only; `gates` then is for diagnosis, the layer mixes by the slots"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """the router's own losses by name, weighted; scalars"""

    def picks(self) -> Tensor:
        """[N, M] what counts as assigned, 0 or 1: the chosen experts, or the largest logit's."""
        if self.chosen is not None:
            return self.chosen.to(self.gates.dtype)
        best = self.logits.argmax(dim=1, keepdim=True)
        picks = torch.zeros_like(self.gates).scatter(1, best, 1.0)
        return picks if self.mask is None else picks * self.mask.unsqueeze(1)

    def real(self, values: Tensor) -> Tensor:
        """The rows of values [N, ...] that belong to real samples."""
        return values if self.mask is None else values[self.mask]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values [N, ...] over the real samples: `[...]`.

        Of a batch that several processes share (see `passes.share_batch`), over all of it.
        """
        if one_batch():
            return self._mean_of_all(values)
        if self.mask is None:
            return values.mean(dim=0) if len(values) else values.sum(dim=0)
        real = self.mask.view(-1, *[1] * (values.dim() - 1))
        return torch.where(real, values, 0.0).sum(dim=0) / self.mask.sum().clamp(min=1)

    def _mean_of_all(self, values: Tensor) -> Tensor:
        """The mean over the processes' real samples."""
        real = torch.ones(len(values), dtype=torch.bool, device=values.device)
        real = real if self.mask is None else self.mask
        shape = real.view(-1, *[1] * (values.dim() - 1))
        count = sum_over_processes(real.sum())
        return batch_sum(torch.where(shape, values, 0.0).sum(dim=0)) / count.clamp(min=1)

    def used(self) -> Tensor:
        """Experts that take part: a scalar for dense routing, [N, 1] for sparse routing."""
        return self.active.sum() if self.chosen is None else self.chosen.sum(dim=1, keepdim=True)

    def without_padding(self, mask: Tensor | None) -> Routing:
        """The same decision with nothing for the padding; `mask`, bool [N], is noted."""
        if mask is None:
            return self
        real = mask.unsqueeze(1)
        return replace(
            self,
            gates=torch.where(real, self.gates, 0.0),
            chosen=None if self.chosen is None else self.chosen & real,
            mask=mask,
        )

    def repeated(self, times: int) -> Routing:
        """One decision per token, from one per sample of `times` tokens each."""
        names = ("gates", "logits", "probabilities", "chosen", "mask", "load")
        given = {name: getattr(self, name) for name in names}
        rows = {n: v.repeat_interleave(times, dim=0) for n, v in given.items() if v is not None}
        return replace(self, **rows)


def hard_routing(owner: Tensor, used: Tensor, active: Tensor, like: Tensor) -> Routing:
    """Each row goes to its `owner` [N] with gate 1, or nowhere where `used` [N] is False.

    `active` [M] as in `Routing`; gates have the dtype of `like`.
    """
    chosen = torch.zeros(len(owner), len(active), dtype=torch.bool, device=owner.device)
    chosen = chosen.scatter(1, owner.unsqueeze(1), used.unsqueeze(1))
    gates = chosen.to(like.dtype)
    logits = torch.where(chosen, 0.0, float("-inf")).to(like.dtype)
    return Routing(gates=gates, logits=logits, probabilities=gates, active=active, chosen=chosen)


RouterSize = tuple[int, int, int, torch.Generator | None]
"""What a layer gives its router after the Config: D, experts at the start, most experts M, and what
draws the weights."""


def most_samples(factor: float, samples: Tensor, experts: Tensor | int) -> Tensor:
    """`ceil(factor * samples / experts)` in float64, of any shape: what an expert takes at most.

    Products that are whole numbers stay so: 1.1 * 100 / 10 is 11, and 11.000000000000002 in floats.
    """
    return (factor * samples.double() / experts - 1e-9).ceil()


def check_option(config: PartConfig, option: str, allowed: bool, what: str) -> None:
    """Refuse an option of a router or a loss; `what` says what it must be, for the message.

    Raises:
        UserError: its value is not allowed.
    """
    if not allowed:
        part, value = config.part, getattr(config, option)
        raise UserError(f"{part.name} {part.kind}: {option}={value!r} must be {what}")


class Router(StepNotes, Part, kind="router"):
    """Base of all routers. Subclasses define `route`, and `reset_parameters` if they hold more.

    Parameters and buffers of a router's own with first axis M are rows of experts; what belongs to
    no expert (a projection, a noise source) stands in a submodule.

    Attributes:
        weight: Parameter [M, D], one row per expert.
        active: buffer [M] bool, which experts exist.
        logit_shift: buffer [M], added to the logits; function-preserving growth splits an expert's
            gate among its copies with it (log 2 each for two).
        selection_bias: buffer [M], added to the scores where experts are chosen, never to gates;
            loss-free balancing steers with it.
        k: most experts that a sample uses; None for all.
        normalised: the gates of a sample that is routed anywhere sum to 1, or to the chosen
            experts' share of 1; else they have a scale of their own, which layers leave alone.
        uses_sizes: `RouterInput.sizes` is wanted.
        steerable: the selection bias has a say in which experts are chosen.
        initial_experts: how many experts there are at the start.
        competing: a sample's experts depend on the others in the batch, unless `independent`.
        independent: every sample is a sequence of its own, so that samples do not compete; set it
            where a sample's routing must not depend on its batch, as in policies.
    """

    active: Tensor
    logit_shift: Tensor
    selection_bias: Tensor
    k: int | None = None
    normalised: bool = True
    uses_sizes: ClassVar[bool] = False
    steerable: ClassVar[bool] = False
    competing: bool = False
    independent: bool = False

    def __init__(
        self, dim: int, num_experts: int, max_experts: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.initial_experts = num_experts
        self._mask_seen = False  # whether `_check_mask` has looked since the experts last changed
        self.weight = nn.Parameter(torch.empty(max_experts, dim))
        self.register_buffer("active", torch.arange(max_experts) < num_experts)
        self.register_buffer("logit_shift", torch.zeros(max_experts))
        self.register_buffer("selection_bias", torch.zeros(max_experts))
        self.draw_rows(every(self.weight), generator)

    def _apply(self, *args: Any, **options: Any) -> Any:
        """As nn.Module; a cast to fewer bits than float32 leaves the selection bias as it is.

        It moves by steps that bfloat16 rounds away.
        """
        before = self.selection_bias
        super()._apply(*args, **options)
        if self.selection_bias.dtype in (torch.bfloat16, torch.float16):
            self.selection_bias = before.float().to(self.selection_bias.device)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, also what earlier versions saved: they called `active` alive."""
        if f"{prefix}alive" in state:
            state[f"{prefix}active"] = state.pop(f"{prefix}alive")
        super()._load_from_state_dict(state, prefix, *args)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: initial number of experts, weights as construction draws them.

        A router that has more than rows of experts (a submodule, a buffer) resets that, too, in the
        order in which it was constructed.
        """
        self.reset_buffers()
        self.draw_rows(every(self.weight), generator)

    def reset_buffers(self) -> None:
        """The initial number of experts, without shifts and biases."""
        self.active.copy_(every(self.active) < self.initial_experts)
        self.logit_shift.zero_()
        self.selection_bias.zero_()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        groups: int = 1,
        sizes: Tensor | None = None,
    ) -> Routing:
        """Route samples x [N, D]; the other arguments are described in `RouterInput`.

        Raises:
            UserError: `route` returned something else than a routing of N samples over M experts,
                or one that uses experts which do not exist yet.
        """
        groups = len(x) if self.independent else groups
        routing = self.route(RouterInput(x, mask, context, groups, sizes))
        if not torch.compiler.is_compiling():
            self._check(routing, (len(x), len(self.active)))
        return routing.without_padding(mask)

    def _check(self, routing: Any, shape: tuple[int, int]) -> None:
        """Refuse what a router of somebody's own may return instead, before it goes further."""
        found = getattr(routing, "gates", routing)
        if isinstance(routing, Routing) and found.shape == shape:
            if not self._mask_seen:
                self._check_mask(routing)
            return
        what = f"{type(found).__name__} {list(getattr(found, 'shape', []))}"
        raise UserError(
            f"{type(self).__name__}.route returned {type(routing).__name__} with gates {what}; "
            f"return a dynmoe.moe.Routing whose gates are [N, M] = {list(shape)}, M counting the "
            "experts that may still come"
        )

    def _check_mask(self, routing: Routing) -> None:
        """Refuse weight for experts that do not exist yet.

        It waits for the device, so it looks at one pass after each change of the experts; where no
        value can be looked at (meta tensors, `torch.func.vmap`), at a later one.
        """
        if routing.gates.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        try:
            given = bool((routing.gates.detach() > 0)[:, ~self.active].any())
            scored = bool((routing.logits.detach() > float("-inf"))[:, ~self.active].any())
        except RuntimeError:
            return
        if given or scored:
            what = "gates above 0" if given else "logits above -inf"
            raise UserError(
                f"{type(self).__name__}.route gives {what} to experts that do not exist yet; put "
                "its logits through self.mask(logits) before it makes gates of them"
            )
        self._mask_seen = True

    @abstractmethod
    def route(self, inputs: RouterInput) -> Routing:
        """Route the samples `inputs.x` [N, D].

        Padding is silenced afterwards; only routers whose samples compete look at `inputs.mask`.
        """

    def finish_step(self) -> None:
        """Move what the training passes since the last optimizer step ask for; here nothing.

        Routers with such state note it in `route`, once per pass (`Passes.learns`), in tensors
        named in `step_notes`, and sum it over all processes here.
        """

    def expert_rows(self) -> list[nn.Parameter]:
        """Parameters whose first axis is the expert axis M; growth resets and copies their rows."""
        return [p for p in self.parameters(recurse=False) if p.shape[:1] == self.active.shape]

    def expert_buffers(self) -> list[Tensor]:
        """Buffers and notes [M, ...], a row per expert; pruning reorders their entries."""
        held = [*self.buffers(recurse=False), *self.notes()]
        return [tensor for tensor in held if tensor.shape[:1] == self.active.shape]

    @torch.no_grad()
    def keep_experts(self, order: Tensor, count: int) -> None:
        """Number the experts by `order` [M] int64, their old numbers; the first `count` exist.

        The others' entries in buffers become 0, as they are before an expert exists.
        """
        for rows in (*self.expert_rows(), *self.expert_buffers()):
            rows.copy_(rows[order])
        for buffer in self.expert_buffers():
            buffer[count:] = 0

    @torch.no_grad()
    def draw_rows(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the rows `index` [n]: uniform in +-1/sqrt(D), as torch's linear layers."""
        self._mask_seen = False
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.expert_rows():
            draw_entries(parameter, 0, index, bound, generator)
        self.logit_shift[index] = 0.0
        self.selection_bias[index] = 0.0

    def mask(self, logits: Tensor) -> Tensor:
        """Shift logits [N, M] and set those of experts that do not exist yet to -inf."""
        return (logits + self.logit_shift).masked_fill(~self.active, float("-inf"))

    def dense(self, logits: Tensor) -> Routing:
        """Routing over all active experts: softmax of the masked logits [N, M]."""
        masked = self.mask(logits)
        gates = masked.softmax(dim=1)
        return Routing(gates=gates, logits=masked, probabilities=gates, active=self.active)

    def choose(self, scores: Tensor, k: int) -> Tensor:
        """[N, M] bool: the min(k, E) active experts of largest score [N, M] + selection bias."""
        scores = (scores.detach() + self.selection_bias).masked_fill(~self.active, float("-inf"))
        best = scores.topk(min(k, scores.shape[1]), dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        return chosen & self.active

    def sparse(
        self, logits: Tensor, probabilities: Tensor, chosen: Tensor, renormalise: bool
    ) -> Routing:
        """Routing to the chosen experts [N, M] with their probabilities as gates.

        Renormalised gates sum to 1. With one expert per sample that would be 1 whatever the
        logits, and the router's gradient exactly zero: pass False there.
        """
        gates = torch.where(chosen, probabilities, 0.0)
        if renormalise:
            tiny = torch.finfo(gates.dtype).tiny
            gates = gates / gates.sum(dim=1, keepdim=True).clamp_min(tiny)
        return Routing(
            gates=gates,
            logits=logits,
            probabilities=probabilities,
            active=self.active,
            chosen=chosen,
        )

"""The mixture-of-experts layer: one router, one expert bank, and the record of the last routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank, UnitBank
from dynmoe.moe.experts.pool import HiddenPool
from dynmoe.moe.loss import AuxLoss, LossInput, PassLosses
from dynmoe.moe.losses.balance import NoLoss
from dynmoe.moe.padding import Padding, sample_means
from dynmoe.moe.passes import Passes, new_pass, one_batch, positions
from dynmoe.moe.router import Router, Routing, Slots, hard_routing
from dynmoe.moe.routers.soft import CosineRouter
from dynmoe.ranges import check_value
from dynmoe.registry import PartConfig, make_config

GateScale = Literal["experts", "one"]
RoutePer = Literal["token", "sample"]


class MoELayer(nn.Module):
    """Experts mixed by a router, `[..., D_in] -> [..., D_out]`.

    Args:
        dim_in: input width, D_in.
        dim_out: output width, D_out.
        hidden: hidden units of all experts together (the parameter budget).
        num_experts: experts at the start.
        max_experts: most experts the layer can grow to; default `num_experts`.
        router: Config or name of a registered router, or a router to share with another layer.
        router_options: options of a router that is given by name: `router="topk"`,
            `router_options={"k": 2}`.
        bank: Config or name of a registered bank.
        bank_options: options of a bank that is given by name.
        losses: Configs or names of auxiliary losses, computed in training mode.
        shared_hidden: hidden units of one more expert that every sample uses with gate 1 beside
            the routed ones (DeepSeekMoE, arXiv 2401.06066, Section 3.2); it does not grow.
        route_per: "token" routes every leading position by itself; "sample" routes x [B, ..., D]
            by the mean over what lies between, all positions of a sample alike. Banks of whole
            samples always do the latter.
        gate_scale: "one" leaves the gates as the router gives them (DynamicMoE's plain form);
            "experts" multiplies normalised gates by the number of experts that a sample uses, so
            that the layer's output keeps its scale as experts multiply.
        activation: "relu", "gelu", "silu", "tanh" or "identity".
        generator: draws the initial weights; None: torch's global one, which `torch.manual_seed`
            seeds.

    Attributes:
        created: buffer [M] int64, creation step of each expert: the growth count (0: the start).
        last_routing: the Routing of the latest forward pass, or None.
        last_losses: its auxiliary losses by name, weighted; empty outside training mode.
        uncollected: the losses of all passes in training that `collect_losses` has not handed out
            since the latest optimizer step.

    Raises:
        UserError: an expert would be left without hidden units, a loss is given twice, a name or an
            option is unknown or has a value that it cannot have, or options come without the name
            of what they belong to.
    """

    created: Tensor

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        hidden: int,
        *,
        num_experts: int = 1,
        max_experts: int | None = None,
        router: PartConfig | Router | str | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank: PartConfig | str | None = None,
        bank_options: Mapping[str, Any] | None = None,
        losses: Sequence[PartConfig | str] = (),
        shared_hidden: int = 0,
        route_per: RoutePer = "token",
        gate_scale: GateScale = "experts",
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_value("gate_scale", gate_scale, GateScale)
        check_value("route_per", route_per, RoutePer)
        max_experts = max(num_experts, max_experts or 0)
        bank = _by_name("bank", bank, bank_options) or HiddenPool.Config()
        router = _by_name("router", router, router_options) or CosineRouter.Config()
        chosen = [_by_name("loss", loss) for loss in losses]
        active = [loss for loss in chosen if not isinstance(loss, NoLoss.Config)]
        if num_experts < 1 or (issubclass(bank.part, UnitBank) and num_experts > hidden):
            raise UserError(
                f"{num_experts} experts cannot share {hidden} hidden units: each needs at least "
                f"one; allowed are 1 to {hidden} experts"
            )
        self.gate_scale = gate_scale
        self.route_per = route_per
        self.router: Router = (
            router
            if isinstance(router, Router)
            else router.build(dim_in, num_experts, max_experts, generator)
        )
        widths = (dim_in, dim_out)
        self.bank: ExpertBank = bank.build(
            *widths, hidden, num_experts, max_experts, activation, generator
        )
        self.shared: ExpertBank | None = None
        if shared_hidden:
            self.shared = bank.build(*widths, shared_hidden, 1, 1, activation, generator)
        self.losses = nn.ModuleList(loss.build(max_experts) for loss in active)
        names = [loss.part.name for loss in active]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"loss {name} is given twice; give it once, with another weight")
        self.register_buffer("created", torch.zeros(max_experts, dtype=torch.long))
        self.last_routing: Routing | None = None
        self.last_losses: dict[str, Tensor] = {}
        self.uncollected: list[PassLosses] = []
        self._passes = Passes()
        self.routing_context: tuple[Tensor | None, Tensor | None] = (None, None)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, also what earlier versions saved: they called `created` birth."""
        if f"{prefix}birth" in state:
            state[f"{prefix}created"] = state.pop(f"{prefix}birth")
        super()._load_from_state_dict(state, prefix, *args)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: experts, weights and buffers as construction makes them.

        So a layer that was made on the meta device can be filled: `layer.to_empty(device=...)`,
        then this. A router that other layers share is reset for them, too.

        Raises:
            UserError: a pool of hidden units has another size than at the start; nothing is reset.
        """
        self.bank.check_resettable()
        self.router.reset_parameters(generator)
        self.bank.reset_parameters(generator)
        if self.shared is not None:
            self.shared.reset_parameters(generator)
        for loss in cast("Sequence[AuxLoss]", self.losses):
            loss.reset_parameters()
        self.created.zero_()
        self.last_routing, self.last_losses, self.uncollected = None, {}, []
        self._passes.clear()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        routing_input: Tensor | None = None,
    ) -> Tensor:
        """Route and mix x [..., D_in] to [..., D_out].

        Args:
            x: the input; banks of whole samples say what shape they take.
            mask: False (or 0) for padding, with one entry per position [B, ...] or, where samples
                are routed, per sample [B]. Whatever stands in padding, NaN included, reaches
                nothing; padding gets output 0 and moves no statistics.
            context: what the router may look at beside x, one entry per position or per sample.
            routing_input: [B, D_in] what samples are routed by, instead of the mean over their
                positions.

        Mask and context fall back on what `routing_inputs` gives.

        Raises:
            UserError: the mask's shape is not that of x, or it is no list of zeros and ones.
        """
        mask = self.routing_context[0] if mask is None else mask
        context = self.routing_context[1] if context is None else context
        by_sample = self.bank.per_sample or self.route_per == "sample" or routing_input is not None
        axis = self.bank.channel_axis if self.bank.per_sample else -1
        padding = None if mask is None else Padding.of(mask, x, axis, by_sample)
        if padding is not None:
            x = padding.blank(x)
        rows = x if self.bank.per_sample else x.reshape(-1, x.shape[-1])
        if routing_input is None:
            routing_input = sample_means(x, axis, padding) if by_sample else rows
        elif padding is not None:
            routing_input = torch.where(padding.samples.unsqueeze(1), routing_input, 0.0)
        groups = max(len(x), 1) if x.dim() > 2 and not by_sample else 1
        span = len(routing_input) // groups if x.dim() > 2 and not by_sample else 1
        with positions(span) if one_batch() else nullcontext():
            routing = self._route(
                routing_input,
                None if padding is None else padding.routed(by_sample),
                None if context is None else _per_row(context, len(routing_input), padding),
                groups,
            )
        self.last_routing = routing
        if by_sample and not self.bank.per_sample:
            routing = routing.repeated(rows.shape[0] // max(len(routing_input), 1))
            if padding is not None:
                routing = routing.without_padding(padding.positions.flatten())
        self.last_losses = self._losses(rows, routing) if self.training else {}
        y = self._mix(rows, routing)
        if not self.bank.per_sample:
            y = y.view(*x.shape[:-1], y.shape[-1])
        if padding is not None:
            y = padding.blank(y)
        return self._keep_losses(y) if self.last_losses else y

    def real_rows(self, x: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """The rows [N, D_in] of a pass without its padding; [N, ...] for banks of whole samples.

        Called with what `forward` was called with, while `routing_inputs` still gives the same.
        """
        mask = self.routing_context[0] if mask is None else mask
        rows = x if self.bank.per_sample else x.reshape(-1, x.shape[-1])
        if mask is None:
            return rows
        real = (mask != 0).reshape(-1).to(rows.device)
        return rows[real.repeat_interleave(len(rows) // max(len(real), 1))]

    def _route(
        self, x: Tensor, mask: Tensor | None, context: Tensor | None, groups: int
    ) -> Routing:
        """Routing of x [N, D_in]; under autocast in the precision of the router's weights.

        In bfloat16 near logits tie, and a few samples in a thousand choose other experts: Switch
        Transformer keeps its router in float32 (Fedus et al. 2022, arXiv 2101.03961, Section 2.4).
        """
        if not torch.is_autocast_enabled(x.device.type):
            return self.router(x, mask, context, groups, self._sizes())
        weights = next((p.dtype for p in self.router.parameters()), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x.to(weights), mask, context, groups, self._sizes())

    def _mix(self, rows: Tensor, routing: Routing) -> Tensor:
        """Outputs of the rows; the shared expert, if any, is added to the routed ones."""
        if routing.slots is None:
            y = self.bank(rows, routing, self.scale(routing))
        else:
            y = mix_slots(self.bank, rows, routing.slots, routing.active)
        if self.shared is not None:
            y = y + self.shared(rows, _always(rows, routing))
        return y

    def _losses(self, rows: Tensor, routing: Routing) -> dict[str, Tensor]:
        inputs = LossInput(rows, routing, self.router, self.bank)
        losses = dict(routing.losses)
        for loss in cast("Sequence[AuxLoss]", self.losses):
            losses[loss.name] = loss.weight * loss(inputs)
        return losses

    def _keep_losses(self, y: Tensor) -> Tensor:
        """Keep the pass's losses until they are collected; y, through which they may reach back."""
        first = PassLosses(self.last_losses)
        kept = self._passes.recall(new_pass(), lambda: first)
        if kept is first:
            self.uncollected.append(first)
            return y
        return kept.go_on_from(y, self.last_losses)

    def collect_losses(self) -> dict[str, Tensor]:
        """Weighted losses by name, added up over what is `uncollected`; scalars."""
        collected: dict[str, Tensor] = {}
        for losses in self.uncollected:
            for name, value in losses.values().items():
                collected[name] = collected[name] + value if name in collected else value
        self.uncollected = []
        return collected

    def finish_step(self) -> None:
        """An optimizer step is done: move what the losses move, forget losses not collected."""
        for loss in cast("Sequence[AuxLoss]", self.losses):
            loss.finish_step(self.router)
        self.uncollected = []
        self._passes.clear()

    def scale(self, routing: Routing) -> Tensor | float:
        """What gates are multiplied by: [N, 1], or one number for all samples."""
        if self.gate_scale == "one" or not self.router.normalised:
            return 1.0
        return routing.used()

    def _sizes(self) -> Tensor | None:
        """[M] hidden units of each expert, for routers that ask; None for banks without units."""
        if self.router.uses_sizes and isinstance(self.bank, UnitBank):
            return F.one_hot(self.bank.segment, self.max_experts).sum(dim=0)
        return None

    def gate_factor(self, experts: int) -> int:
        """What gates are multiplied by while that many experts exist."""
        plain = self.gate_scale == "one" or not self.router.normalised
        return 1 if plain else min(experts, self.router.k or experts)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last pass out: its tensors belong to a graph."""
        return {**self.__dict__, "last_routing": None, "last_losses": {}, "uncollected": []}

    @property
    def num_experts(self) -> int:
        """Experts that exist now."""
        return int(self.router.active.sum())

    @property
    def max_experts(self) -> int:
        """Experts that the layer can hold."""
        return len(self.router.active)

    def extra_repr(self) -> str:
        """Shown in `print(model)`."""
        if self.created.is_meta:  # nobody knows yet which experts exist
            return f"max_experts={self.max_experts}"
        text = f"experts={self.num_experts}/{self.max_experts}"
        if isinstance(self.bank, UnitBank):
            text += f", hidden_sizes={self.bank.hidden_sizes()}"
        return text


def _by_name(kind: str, part: Any, options: Mapping[str, Any] | None = None) -> Any:
    """The Config of a part that is given by name; whatever else is given, as it is."""
    if isinstance(part, str):
        return make_config(kind, part, options)
    if options:
        raise UserError(
            f"{kind}_options={dict(options)} needs the {kind}'s name: {kind}=NAME; options of a "
            "Config stand in the Config"
        )
    return part


def mix_slots(bank: ExpertBank, rows: Tensor, slots: Slots, active: Tensor) -> Tensor:
    """Soft-MoE: experts see mixtures of tokens, tokens get mixtures of their outputs.

    Args:
        rows: [G * T, D_in] tokens, group by group. active: [M] bool.

    Returns:
        [G * T, D_out]: `C f(D^T x)` (Puigcerver et al. 2024, arXiv 2308.00951, Section 2.1).

    Raises:
        UserError: whole samples are routed, whose tokens cannot mix.
    """
    groups, tokens, count = slots.dispatch.shape
    if rows.dim() != 2 or len(rows) != groups * tokens:
        raise UserError(
            "slot routing mixes tokens: it needs route_per=token and a bank of single tokens, "
            "not of whole samples"
        )
    inputs = slots.dispatch.transpose(1, 2) @ rows.view(groups, tokens, rows.shape[1])
    owner, used = slots.owner.repeat(groups), slots.used.repeat(groups)
    outputs = bank(inputs.flatten(0, 1), hard_routing(owner, used, active, rows))
    return (slots.combine @ outputs.view(groups, count, outputs.shape[1])).flatten(0, 1)


def _always(rows: Tensor, routing: Routing) -> Routing:
    """Routing of every row to the only expert of a bank, with gate 1."""
    one = torch.ones(len(rows), 1, dtype=routing.gates.dtype, device=rows.device)
    active = torch.ones(1, dtype=torch.bool, device=rows.device)
    return Routing(gates=one, logits=torch.zeros_like(one), probabilities=one, active=active)


def _per_row(context: Tensor, rows: int, padding: Padding | None) -> Tensor:
    """Context of samples [B, ...] or positions [B, T, ...] as one entry per row [N, ...]."""
    if context.shape[0] != rows:
        if rows % max(context.shape[0], 1) == 0 and context.shape[:2].numel() != rows:
            context = context.repeat_interleave(rows // context.shape[0], dim=0)
        else:
            context = context.flatten(0, 1)
    if padding is None or not context.is_floating_point():
        return context
    real = padding.samples if len(padding.samples) == rows else padding.positions.flatten()
    return torch.where(real.view(-1, *[1] * (context.dim() - 1)), context, 0.0)

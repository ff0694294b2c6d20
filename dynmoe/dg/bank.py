"""Outer experts: whole sets of MoA layers, as rows of stacked parameters.

Eq. 2 of MoE², `theta(x) = sum_k w_k(x) theta_k`, is a core MoE layer whose expert k says theta_k
whatever the input: its output is the synthesised set. So the core's router, growth controller,
diversity loss and statistics serve unchanged.

Shapes: B samples, M most outer experts, K those that exist, Y adapted layers, S numbers of a set
that are mixed sample by sample; the others as in `dynmoe.dg.moa`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dynmoe.dg.adapters import Factors, default_terms, draw_xavier
from dynmoe.dg.backbone import features
from dynmoe.dg.moa import Adapter, MoAConfig, MoALinear, Theta, check_config
from dynmoe.errors import UserError
from dynmoe.moe import ExpertBank, Routing
from dynmoe.moe.draws import home
from dynmoe.registry import PartConfig

Synthesis = Literal["factors", "deltas"]
PLAIN = ("bias", "project", "offset", "anchors", "log_scale")
"""What is mixed per sample in either synthesis: all but the factors of the updates."""


class AdapterBank(ExpertBank):
    """Rows theta_k; its output for a sample is the part of theta(x) that is mixed per sample.

    synthesis "factors" mixes every tensor (Eq. 2 to the letter): the update is then of the mixed
    u, v, L and R, and has cross terms of different experts. "deltas" mixes the experts' updates H_k
    instead, and everything else as before. They are different models, equal only where one expert
    has all the weight or all are alike. Updates H [D_in, D_out] are formed in neither; the largest
    matrix of a sample is the gate's projection [G, D_in]. Mixing its outputs instead, K projections
    of every token, would be the same, but dearer in time and, with more than D_in / K tokens, in
    memory.

    The first rows are copies of one draw plus normal noise. Later ones are copies of the mean of
    the rows before them plus noise (our choice), unless the growth's init copies a parent.

    Attributes:
        rows: name -> Parameter [M, ...]: left [M, Y, T, p, R], right [M, Y, T, R, q], bias
            [M, Y, D_out], project [M, Y, G, D_in], offset [M, Y, G], anchors [M, Y, I, G],
            log_scale [M, Y]; with Kronecker adapters u and v [M, T, T], shared by the layers.

    Raises:
        UserError: options that cannot work.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """What an outer expert consists of."""

        options: MoAConfig
        """ranks, terms and the gate's width"""
        adapter: Adapter
        """kind of update"""
        synthesis: Synthesis
        """what is mixed"""
        init_noise: float
        """standard deviation of the noise on the experts' common start"""
        layers: int
        """Y"""
        width_in: int
        """D_in of the adapted layers"""
        width_out: int
        """D_out of the adapted layers"""

    def __init__(
        self,
        config: Config,
        dim_in: int,
        dim_out: int,
        hidden: int,
        num_experts: int,
        max_experts: int,
        activation: str,
        generator: torch.Generator | None,
    ) -> None:
        check_config(config.options, config.adapter, config.width_in, config.width_out)
        if config.synthesis not in get_args(Synthesis):
            raise UserError(
                f"synthesis={config.synthesis!r} must be one of {', '.join(get_args(Synthesis))}"
            )
        if not 0 <= config.init_noise < float("inf"):
            raise UserError(f"init_noise={config.init_noise} must be a number of at least 0")
        super().__init__()
        self.config = config
        shapes = set_shapes(config)
        self.rows = nn.ParameterDict(
            {name: torch.zeros(max_experts, *shape) for name, shape in shapes.items()}
        )
        factors = [n for n in ("left", "right", "u", "v") if n in shapes]
        self.mixed = [*PLAIN, *(factors if config.synthesis == "factors" else [])]
        self.reset_parameters(generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """[B, S] the mixed numbers of each sample; x [B, ...] has no say."""
        return self.mix((routing.gates * gate_scale)[:, : self.count(routing)])

    def mix(self, gates: Tensor) -> Tensor:
        """[B, S] `sum_k gates[b, k] theta_k` over the first K experts, from gates [B, K]."""
        flat = torch.cat([self.rows[n][: gates.shape[1]].flatten(1) for n in self.mixed], dim=1)
        return gates @ flat

    def thetas(self, mixed: Tensor, gates: Tensor) -> list[Theta]:
        """One Theta per layer.

        Args:
            mixed: [B, S], what `forward` or `mix` gave.
            gates: [B, K] weights of the first K experts.
        """
        per_sample = self._unflatten(mixed)
        factors, weights = self._factors(per_sample, gates)
        plain = {name: per_sample[name].unbind(1) for name in PLAIN}
        return [
            Theta(
                factors=factors[layer],
                term_weights=weights,
                **{name: plain[name][layer] for name in PLAIN},
            )
            for layer in range(self.config.layers)
        ]

    def _factors(
        self, per_sample: dict[str, Tensor], gates: Tensor
    ) -> tuple[list[Factors], Tensor | None]:
        """The updates of each layer, and weights [B, T] of their terms in "deltas"."""
        if self.config.synthesis == "factors":
            left, right = per_sample["left"].unbind(1), per_sample["right"].unbind(1)
            one = left[0].new_ones(len(left[0]), 1, 1)
            u, v = per_sample.get("u", one), per_sample.get("v", one)
            return [Factors(a, b, u, v) for a, b in zip(left, right, strict=True)], None
        count = gates.shape[1]  # the experts' terms stand in one row: T = K x their number
        rows = {name: tensor[:count] for name, tensor in self.rows.items()}
        left, right = rows["left"].unbind(1), rows["right"].unbind(1)
        one = left[0].new_ones(count, 1, 1)
        u, v = rows.get("u", one), rows.get("v", one)
        updates = [
            Factors(*(factor.flatten(0, 1).unsqueeze(0) for factor in (a, b, u, v)))
            for a, b in zip(left, right, strict=True)
        ]
        return updates, gates.repeat_interleave(left[0].shape[1], dim=1)

    def _unflatten(self, mixed: Tensor) -> dict[str, Tensor]:
        """Name -> [B, ...] from [B, S]."""
        shapes = [self.rows[name].shape[1:] for name in self.mixed]
        parts = mixed.split([shape.numel() for shape in shapes], dim=1)
        named = zip(self.mixed, parts, shapes, strict=True)
        return {name: part.view(len(mixed), *shape) for name, part, shape in named}

    def count(self, routing: Routing) -> int:
        """Experts to mix: those that exist, or all M under torch.compile, where shapes stay."""
        return len(routing.active) if torch.compiler.is_compiling() else int(routing.active.sum())

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, B, S] each expert's own numbers, the same for every sample of x [B, ...]."""
        flat = torch.cat([self.rows[name].flatten(1) for name in self.mixed], dim=1)
        return flat.unsqueeze(1).expand(-1, len(x), -1)

    def expert_rows(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.rows.values())

    def output_rows(self) -> list[nn.Parameter]:
        """R and the bias: the adapted layers' change is linear in both, in either synthesis."""
        return [self.rows["right"], self.rows["bias"]]

    @torch.no_grad()
    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the rows `index` [n]: one start for all, and noise of their own."""
        before = int(index.min()) if len(index) else 0
        for name, rows in self.rows.items():
            device, shape = home(generator), (len(index), *rows.shape[1:])
            start = rows[:before].mean(dim=0) if before else self._draw(name, generator)
            noise = torch.randn(shape, generator=generator, device=device)
            rows[index] = (start.to(device) + self.config.init_noise * noise).to(rows)

    def _draw(self, name: str, generator: torch.Generator | None) -> Tensor:
        """The first start of one tensor, [...] without the expert axis; MoA's draws."""
        shape, options = self.rows[name].shape[1:], self.config.options
        drawn = torch.zeros(shape, device=home(generator))
        kronecker = self.config.adapter == "kadaptation"
        if name in ("left", "right") and kronecker:
            for part in drawn.split(options.ranks, dim=3 if name == "left" else 2):
                draw_xavier(part, generator)
        elif name in ("left", "project", "offset"):
            bound = self.config.width_in**-0.5
            drawn.uniform_(-bound, bound, generator=generator)
        elif name in ("u", "v"):
            drawn.uniform_(-0.01, 0.01, generator=generator)
        elif name == "anchors":
            drawn.normal_(0.0, 0.01, generator=generator)
        elif name == "log_scale":
            drawn.fill_(math.log(2.0))
        return drawn


AdapterBank.Config.part = AdapterBank  # registered nowhere: it needs the sizes of a backbone


def bank_for(
    backbone: nn.Module,
    options: MoAConfig,
    adapter: Adapter,
    synthesis: Synthesis = "factors",
    init_noise: float = 0.0,
) -> AdapterBank.Config:
    """The bank that fits a backbone's attention."""
    base: nn.Linear = backbone.blocks[0].attn.qkv  # type: ignore[index,union-attr]
    return AdapterBank.Config(
        options=options,
        adapter=adapter,
        synthesis=synthesis,
        init_noise=init_noise,
        layers=len(range(0, len(backbone.blocks), options.every)),  # type: ignore[arg-type]
        width_in=base.in_features,
        width_out=base.out_features,
    )


def set_shapes(config: AdapterBank.Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of one outer expert."""
    options, layers, ranks = config.options, config.layers, sum(config.options.ranks)
    kronecker = config.adapter == "kadaptation"
    terms = (options.terms or default_terms(config.width_in)) if kronecker else 1
    shapes: dict[str, tuple[int, ...]] = {
        "left": (layers, terms, config.width_in // terms, ranks),
        "right": (layers, terms, ranks, config.width_out // terms),
        "bias": (layers, config.width_out),
        "project": (layers, options.gate_dim, config.width_in),
        "offset": (layers, options.gate_dim),
        "anchors": (layers, len(options.ranks), options.gate_dim),
        "log_scale": (layers,),
    }
    return shapes | ({"u": (terms, terms), "v": (terms, terms)} if kronecker else {})


def adapted_features(
    backbone: nn.Module, layers: list[MoALinear], thetas: list[Theta], images: Tensor
) -> Tensor:
    """[B, D] features of images [B, C, H, W] with the layers' parameters for this pass."""
    for layer, theta in zip(layers, thetas, strict=True):
        layer.theta = theta
    try:
        return features(backbone, images)
    finally:
        for layer in layers:
            layer.theta = None


def whole_set(bank: AdapterBank) -> list[Theta]:
    """The Theta of each layer from a bank of one set, shared by all samples."""
    alone = bank.rows["bias"].new_ones(1, 1)
    return bank.thetas(bank.mix(alone), alone)


def balance(layers: list[MoALinear], weight: float) -> dict[str, Tensor]:
    """The layers' load-balancing losses, weighted, summed to a scalar; none outside training."""
    losses = [layer.last_balance for layer in layers if layer.last_balance is not None]
    return {"balance": weight * torch.stack(losses).sum()} if losses else {}

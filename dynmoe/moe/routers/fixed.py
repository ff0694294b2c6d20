"""Routing that is not learned: controls, and hashes of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.draws import GOLDEN, draw_normal, draw_seed, every, scramble
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option, hard_routing
from dynmoe.registry import PartConfig


class RandomRouter(Router, name="random", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 15"):
    """The K best of random linear scores that are never trained, each with gate 1.

    Gates are 0 or 1, and a layer adds up the chosen experts' outputs. `gate=share` divides them by
    the number of experts used, so that they sum to 1 as other routers' do; in layers with
    `gate_scale="experts"` the outputs are the same. The scores' `weight` takes no gradient; growth
    draws rows for new experts as it does for every router.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the random router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""
        gate: Literal["one", "share"] = "one"
        """gate of each chosen expert: 1 (Eq. 15), or 1 / number of experts used"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        most = size[2]
        check_option(config, "k", 1 <= config.k <= most, f"between 1 and {most}")
        check_option(config, "gate", config.gate in ("one", "share"), "one or share")
        super().__init__(*size)
        self.weight.requires_grad_(False)
        self.k = config.k
        self.normalised = config.gate == "share"

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to min(K, E) experts with equal gates."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        chosen = self.choose(logits, self.k)
        gates = chosen.to(logits.dtype)
        return Routing(
            gates=gates / gates.sum(dim=1, keepdim=True) if self.normalised else gates,
            logits=logits,
            probabilities=logits.softmax(dim=1),
            active=self.active,
            chosen=chosen,
        )


class HashRouter(Router, name="hash", source="Roller et al. 2021 (arXiv 2106.04426), Section 3"):
    """A fixed random hash of the token id, modulo the number of experts, with gate 1.

    The ids come as context. Without a context (our choice) a sample's id are the signs of fixed
    random projections of it, so that near samples share an expert. Nothing is learned: `weight` is
    not used and takes no gradient. Growth changes the modulus, and with it nearly every token's
    expert.

    Attributes:
        seed: buffer [1] int64, of the hash.
        planes: buffer [bits, D], what samples without a token id are projected on.
    """

    seed: Tensor
    planes: Tensor
    k = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the hash router."""

        bits: int = 8
        """random projections for samples without a token id; 2^bits ids can result"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, _, _, generator = size
        check_option(config, "bits", 1 <= config.bits <= 62, "between 1 and 62")
        super().__init__(*size)
        self.weight.requires_grad_(False)
        self.register_buffer("seed", torch.empty(1, dtype=torch.long))
        self.register_buffer("planes", torch.empty(config.bits, dim))
        self._draw_hash(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, with another hash."""
        super().reset_parameters(generator)
        self._draw_hash(generator)

    def _draw_hash(self, generator: torch.Generator | None) -> None:
        draw_seed(self.seed, generator)
        draw_normal(self.planes, every(self.planes), 1.0, generator)

    def expert_buffers(self) -> list[Tensor]:
        """Without `planes`, of which there may be as many as experts."""
        return [buffer for buffer in super().expert_buffers() if buffer is not self.planes]

    def route(self, inputs: RouterInput) -> Routing:
        """Route by the token ids [N] in the context, or by x [N, D].

        Raises:
            UserError: the context is no list of whole numbers.
        """
        ids = inputs.context
        if ids is None:
            above = (inputs.x @ self.planes.T > 0).long()
            ids = (above << torch.arange(len(self.planes), device=above.device)).sum(dim=1)
        elif ids.dim() != 1 or ids.is_floating_point():
            raise UserError(
                f"hash router: a context of shape {list(ids.shape)} and {ids.dtype} is no list of "
                "token ids; give one int64 per token"
            )
        return _modulo(scramble(self.seed + ids.long() * GOLDEN) & (2**63 - 1), self, inputs)


class OracleRouter(Router, name="oracle", source="ours"):
    """Expert = label modulo the number of experts, with gate 1; a control that is told the answer.

    Labels, task ids or the like come as context. Nothing is learned: `weight` is not used and takes
    no gradient.
    """

    k = 1

    def __init__(self, config: PartConfig, *size: *RouterSize) -> None:
        super().__init__(*size)
        self.weight.requires_grad_(False)

    def route(self, inputs: RouterInput) -> Routing:
        """Route by the labels [N] in the context.

        Raises:
            UserError: no context, or one that is no list of whole numbers.
        """
        label = inputs.context
        if label is None:
            raise UserError(
                "oracle router: no labels; run the model inside "
                "`with dynmoe.moe.routing_inputs(model, context=labels)`"
            )
        if label.dim() != 1 or label.is_floating_point():
            raise UserError(
                f"oracle router: a context of shape {list(label.shape)} and {label.dtype} is no "
                "list of labels; give one int64 per sample"
            )
        return _modulo(label.long(), self, inputs)


def _modulo(number: Tensor, router: Router, inputs: RouterInput) -> Routing:
    """Routing of each sample to its number [N] modulo the number of experts, with gate 1."""
    everywhere = torch.ones_like(number, dtype=torch.bool)
    return hard_routing(number % router.active.sum(), everywhere, router.active, inputs.x)

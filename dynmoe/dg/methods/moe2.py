"""MoE²: outer experts, each a set of mixture-of-adapters layers, mixed into one for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.dg.backbone import features
from dynmoe.dg.bank import AdapterBank, Synthesis, adapted_features, balance, bank_for
from dynmoe.dg.method import DGMethod
from dynmoe.dg.moa import Adapter, MoAConfig, insert_moa
from dynmoe.dg.prototypes import Embedding, Prototypes, domain_means, kmeans, style
from dynmoe.errors import UserError
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.losses.diversity import Form, PrototypeDiversity
from dynmoe.moe.model import undisturbed
from dynmoe.moe.routers.soft import CosineRouter


class MoE2(DGMethod, name="moe2", source="Radwan et al. 2026 (AAAI), MoE², Eqs. 2, 5, 8 and 9"):
    """Each image runs with its own mixture of K outer experts, by cosine to K prototypes.

    `w_k = softmax_k(cos(phi, v_k) / tau)` with phi the frozen backbone's own feature of the image
    (Eq. 5; a first pass without adapters), `theta = sum_k w_k theta_k` (Eq. 2), one adapted pass,
    a linear head. An outer expert is a set of MoA layers. `outer` is a core MoE layer with them as
    its experts, so `moe_layers`, `GrowthController` and `routing_stats` see K experts; the token
    gates inside them are no layers of the core, since their parameters differ from sample to
    sample.

    Prototypes start as random directions of length 1 and are not normalised in the diversity loss
    (our choice). Growth is our own extension; with the init zero-output it leaves the function as
    it was, in both ways of synthesis.

    Attributes:
        outer: MoELayer [B, D] -> [B, S], router and bank of the outer experts.
        layers: the adapted linear layers in the backbone.
    """

    embeds = True
    origin: Tensor
    steps: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of MoE²."""

        experts: int = 5
        """outer experts at the start (the paper's count of parameters fits five)"""
        max_experts: int = 0
        """outer experts that there is room for, counted from the start; 0: no growth"""
        synthesis: Synthesis = "factors"
        """what is mixed: every factor (Eq. 2 to the letter), or the updates that they make"""
        adapter: Adapter = "kadaptation"
        """kind of update in the outer experts"""
        temperature: float = 0.5
        """tau, divides the cosines (Table 3)"""
        init_noise: float = 1e-4
        """standard deviation of the noise by which they differ at the start (Table 4)"""
        diversity: float = 0.2
        """weight of the diversity loss (Table 6)"""
        diversity_form: Form = "euclidean"
        """how it measures the prototypes' similarity (Eq. 9; Table 5)"""
        smoothing: float = 0.1
        """label smoothing; the paper does not say how much"""
        prototypes: Prototypes = "random"
        """where prototypes start: random directions; k-means on the sources' training embeddings;
        or the mean embedding of each source domain (ours)"""
        centre: bool = False
        """subtract the sources' mean embedding before cosines are taken (ours)"""
        embedding: Embedding = "final"
        """what is routed by: the class token after the last norm, or the style (mean and deviation
        of the tokens) behind an early block (ours)"""
        block: int = 0
        """that block, counted from 0"""
        temperature_start: float = 0.0
        """tau at the first step, from which it moves linearly to `temperature`; 0: no schedule"""
        temperature_steps: int = 100
        """steps until it is there"""

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make the outer experts."""
        room = config.max_experts or config.experts
        if config.experts < 1 or room < config.experts:
            raise UserError(
                f"moe2: experts={config.experts} must be at least 1 and at most max_experts={room}"
            )
        if not 0 <= config.smoothing < 1:
            raise UserError(f"moe2: smoothing={config.smoothing} must be at least 0 and below 1")
        _check_routing(config, len(self.backbone.blocks))  # type: ignore[arg-type]
        self.config = config
        self.smoothing = config.smoothing
        self.balance = config.balance
        self.starts = config.prototypes != "random" or config.centre
        width = self.dim if config.embedding == "final" else 2 * self.dim
        if config.centre:
            self.register_buffer("origin", torch.zeros(width))
        if config.temperature_start:
            self.register_buffer("steps", torch.tensor(0))
        bank = bank_for(self.backbone, config, config.adapter, config.synthesis, config.init_noise)
        losses = PrototypeDiversity.Config(weight=config.diversity, form=config.diversity_form)
        self.outer = MoELayer(
            width,
            0,  # the width of what the bank returns is its own affair
            0,
            num_experts=config.experts,
            max_experts=room,
            router=CosineRouter.Config(temperature=config.temperature),
            bank=bank,
            losses=[losses],
            gate_scale="one",
            generator=generator,
        )
        weight = self.outer.router.weight
        with torch.no_grad():
            weight.copy_(F.normalize(weight, dim=1))
        self.layers = insert_moa(self.backbone, config, generator)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]; penalties "diversity" and "balance"."""
        mixed = self.outer(self._routed(self.embed(images) if embedding is None else embedding))
        routing = self.outer.last_routing
        assert routing is not None
        bank = self._bank()
        count = bank.count(routing)
        thetas = bank.thetas(mixed, routing.gates[:, :count])
        z = adapted_features(self.backbone, self.layers, thetas, images)
        penalties = balance(self.layers, self.balance)
        for loss in self.outer.collect_losses().values():  # one, in training mode
            penalties["diversity"] = loss
        return self.head(z).unsqueeze(0), penalties

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """[B, D] features of the frozen backbone, or [B, 2 D] style of an early block."""
        if self.config.embedding == "final":
            return features(self.backbone, images)
        return style(self.backbone, images, self.config.block)

    @torch.no_grad()
    def start(self, embedding: Tensor, domains: Tensor, generator: torch.Generator) -> None:
        """Place the origin of the embeddings, and the prototypes."""
        count, weight = self.config.experts, self.outer.router.weight
        if self.config.centre:
            self.origin.copy_(embedding.mean(dim=0))
            embedding = embedding - self.origin
        if self.config.prototypes == "kmeans":
            weight[:count] = kmeans(embedding, count, generator)
        elif self.config.prototypes == "domains":
            weight[:count] = domain_means(embedding, domains, count)

    def after_step(self) -> None:
        """Count the step, for the temperature."""
        if self.config.temperature_start:
            self.steps += 1

    @torch.no_grad()
    def gates(self, embedding: Tensor) -> Tensor:
        """[B, K] weights of the outer experts by embeddings [B, E]."""
        return self.outer.router(self._routed(embedding)).gates[:, : self.outer.num_experts]

    def expert_logits(self, images: Tensor, embedding: Tensor | None) -> Tensor:
        """[K, B, C] of the outer experts alone."""
        one_hot = torch.eye(self.outer.num_experts, device=images.device, dtype=images.dtype)
        return torch.stack([self.forward_with(images, g.expand(len(images), -1)) for g in one_hot])

    def _routed(self, embedding: Tensor) -> Tensor:
        """What the router is given, at the temperature of now."""
        config, router = self.config, self.outer.router
        if config.temperature_start:
            done = min(1.0, int(self.steps) / config.temperature_steps)
            rest = config.temperature - config.temperature_start
            router.temperature = config.temperature_start + done * rest  # type: ignore[assignment]
        return embedding - self.origin if config.centre else embedding

    def measures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """How far mixed parameters are from mixed outputs: `departure`."""
        return departure(self, images, labels)

    def forward_with(self, images: Tensor, gates: Tensor) -> Tensor:
        """Logits [B, C] by weights [B, K] of the first K outer experts, as `forward` computes them.

        One-hot rows give what an outer expert says alone.
        """
        bank = self._bank()
        thetas = bank.thetas(bank.mix(gates), gates)
        return self.head(adapted_features(self.backbone, self.layers, thetas, images))

    def _bank(self) -> AdapterBank:
        bank = self.outer.bank
        assert isinstance(bank, AdapterBank)
        return bank


def _check_routing(config: MoE2.Config, depth: int) -> None:
    """Refuse options of the routing that cannot work.

    Raises:
        UserError: names the option.
    """
    for name, allowed in (("prototypes", Prototypes), ("embedding", Embedding)):
        value = getattr(config, name)
        if value not in get_args(allowed):
            raise UserError(f"moe2: {name}={value!r} must be one of {', '.join(get_args(allowed))}")
    if not 0 <= config.block < depth:
        raise UserError(f"moe2: block={config.block} must be at least 0 and below {depth}")
    if not 0 <= config.temperature_start < float("inf") or config.temperature_steps < 1:
        raise UserError(
            f"moe2: temperature_start={config.temperature_start} must be a number of at least 0, "
            f"and temperature_steps={config.temperature_steps} at least 1"
        )


def router_identity(p: Tensor, w: Tensor, experts: Tensor, labels: Tensor) -> Tensor:
    """[B] `log((p . S_y) / (w . S_y))`, the excess loss of routing by w where p is right (Eq. 6).

    Args:
        p: [B, K] weights that add up to 1.
        w: the same of another mixture.
        experts: [B, K, C] class probabilities of each expert.
        labels: [B] classes y.
    """
    own = experts.gather(2, labels.view(-1, 1, 1).expand(-1, experts.shape[1], 1)).squeeze(2)
    return torch.log((p * own).sum(dim=1)) - torch.log((w * own).sum(dim=1))


@torch.no_grad()
def departure(method: MoE2, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What mixing parameters gives against mixing the same experts' probabilities.

    Lemma 1 (`router_identity`) is about mixed probabilities, `f_y = w . S_y`; MoE² mixes
    parameters, for which it does not hold. This measures by how much, at the cost of a pass per
    expert. All means are over the batch.

    Args:
        method: in any mode; it is left as it was.
        images: [B, 3, H, W].
        labels: [B].

    Returns:
        kl: mean KL(mixed outputs || mixed parameters), nats. loss_change: mean cross-entropy with
        mixed parameters minus with mixed outputs, 0 where Lemma 1 would hold. loss_change_abs: mean
        of its absolute value per sample. agreement: share of equal decisions. spread: mean KL of
        an expert from the mixed outputs (weighted), to compare `kl` with: 0 where experts agree.
    """
    with undisturbed(method):
        embedding = method.embed(images)
        gates = method.gates(embedding)
        mixed = method(images, embedding).log_softmax(dim=1)
        each = method.expert_logits(images, embedding).transpose(0, 1).log_softmax(dim=2)
    oracle = torch.log((gates.unsqueeze(2) * each.exp()).sum(dim=1))
    own = labels.unsqueeze(1)
    change = (oracle.gather(1, own) - mixed.gather(1, own)).squeeze(1)
    spread = (each.exp() * (each - oracle.unsqueeze(1))).sum(dim=2)
    return {
        "kl": float((oracle.exp() * (oracle - mixed)).sum(dim=1).mean()),
        "loss_change": float(change.mean()),
        "loss_change_abs": float(change.abs().mean()),
        "agreement": float((oracle.argmax(1) == mixed.argmax(1)).float().mean()),
        "spread": float((gates * spread).sum(dim=1).mean()),
    }

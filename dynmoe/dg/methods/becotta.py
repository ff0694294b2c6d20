"""BECoTTA's layers for known source domains: a router per domain over shared low-rank experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.backbone import features, wide
from dynmoe.dg.method import DGMethod
from dynmoe.dg.prototypes import style
from dynmoe.errors import UserError
from dynmoe.moe.draws import Noise, draw_uniform, seeded_linear
from dynmoe.moe.passes import batch_sum
from dynmoe.registry import PartConfig


class BecottaDG(
    DGMethod, name="becotta", source="after Lee et al. 2024 (arXiv 2402.08712), BECoTTA"
):
    """Frozen backbone; low-rank experts beside every block, chosen by the router of one's domain.

    The paper adapts at test time; here its parts learn from the sources' domain labels, as in its
    initialisation. An image's domain is its label in training, and what a linear discriminator of
    its style says otherwise. The synergy loss is the negative mutual information of domain and
    expert, per layer. Ours: routing per image, by the mean token; the discriminator sees mean and
    deviation of the frozen first block's tokens; experts start silent. Where a training batch
    comes without domains, those that the discriminator finds stand in for them.

    Attributes:
        layers: the wrapped blocks.
        discriminator: style [B, 2 D] -> logits of the source domains.
    """

    embeds = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of BECoTTA's layers."""

        domains: int = 3
        """source domains, each with a router in every layer"""
        experts: int = 6
        """experts beside each block"""
        top: int = 3
        """experts that an image uses"""
        rank: int = 4
        """width of an expert's bottleneck"""
        synergy: float = 0.1
        """weight of the synergy loss, the mean over layers of the negative mutual information"""

    @staticmethod
    def unfit(config: Any, sources: int) -> str:
        """The number of domains, if some source domain would have no router."""
        return "" if config.domains >= sources else "domains"

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Wrap the blocks."""
        if min(config.domains, config.experts, config.rank) < 1:
            raise UserError(
                f"becotta: domains={config.domains}, experts={config.experts} and rank="
                f"{config.rank} must be at least 1"
            )
        if not 1 <= config.top <= config.experts or not 0 <= config.synergy < float("inf"):
            raise UserError(
                f"becotta: top={config.top} must lie in 1 .. experts={config.experts}, and synergy="
                f"{config.synergy} be a number of at least 0"
            )
        self.config = config
        self.backbone.requires_grad_(False)
        blocks: Any = self.backbone.blocks
        self.layers: list[DomainExpertsBlock] = []
        for number, block in enumerate(list(blocks)):
            layer = DomainExpertsBlock(block, self.dim, config, generator)
            blocks[number] = layer
            self.layers.append(layer)
        self.discriminator = seeded_linear(2 * self.dim, config.domains, generator)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """[B, 2 D] style of the first block, without experts."""
        return style(self.backbone, images, 0)

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        embedding: Tensor | None = None,
        domains: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies of classes and of domains, and the synergy loss.

        Raises:
            UserError: a domain without a router.
        """
        guess = self.discriminator(self.embed(images) if embedding is None else embedding)
        known = guess.argmax(dim=1) if domains is None else domains
        if int(known.max()) >= self.config.domains:
            raise UserError(
                f"becotta: there are {int(known.max()) + 1} source domains, and domains="
                f"{self.config.domains}; use --method.domains {int(known.max()) + 1}"
            )
        logits = self._pass(images, known)
        parts = {
            "classification": F.cross_entropy(logits, labels),
            "discriminator": F.cross_entropy(guess, known),
        }
        shares = [layer.probabilities for layer in self.layers]
        information = [mutual_information(p, known) for p in shares if p is not None]
        parts["synergy"] = -self.config.synergy * torch.stack(information).mean()
        return torch.stack(list(parts.values())).sum(), parts

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C], by the domains that the discriminator finds."""
        seen = self.embed(images) if embedding is None else embedding
        return self._pass(images, self.discriminator(seen).argmax(dim=1)).unsqueeze(0), {}

    def _pass(self, images: Tensor, domains: Tensor) -> Tensor:
        """[B, C] with the routers of these domains [B]."""
        for layer in self.layers:
            layer.domains = domains
        try:
            return self.head(features(self.backbone, images))
        finally:
            for layer in self.layers:
                layer.domains = None


class DomainExpertsBlock(nn.Module):
    """A frozen block [B, N, D] -> [B, N, D] and experts of its output.

    `y = block(x); y + sum_e g_e up_e(gelu(down_e y))` over the `top` experts of the largest noisy
    logit, g their softmax. Logits are `m W_d + noise softplus(m V_d)`, the latter in training only,
    m the mean token and d the image's domain. Without domains it is the block alone.

    Attributes:
        domains: [B], set before a pass and taken away after it.
        probabilities: [B, E] of the latest pass: softmax of all noise-free logits.
    """

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        config: BecottaDG.Config,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.block, self.top = block, config.top
        shape = (config.domains, config.experts, dim)
        self.gate, self.gate_noise = (nn.Parameter(torch.empty(shape)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(config.experts, dim, config.rank))
        self.up = nn.Parameter(torch.empty(config.experts, config.rank, dim))
        self.noise = Noise(generator)
        self.domains: Tensor | None = None
        self.probabilities: Tensor | None = None
        for parameter in (self.gate, self.gate_noise, self.down):
            draw_uniform(parameter, dim**-0.5, generator)
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """[B, N, D] -> [B, N, D]; what else the backbone gives its blocks is passed on."""
        y = self.block(x, *args, **options)
        if self.domains is None:
            return y
        chosen, gates = self._route(y.mean(dim=1), self.domains)
        change = torch.zeros_like(y)
        for place in range(self.top):
            down, up = self.down[chosen[:, place]], self.up[chosen[:, place]]
            change = change + gates[:, place].view(-1, 1, 1) * (F.gelu(y @ down) @ up)
        return y + change

    def _route(self, mean: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [B, top] and their gates, from mean tokens [B, D]."""
        logits = wide(torch.einsum("bd,bed->be", mean, self.gate[domains]))
        self.probabilities = logits.softmax(dim=1)
        if self.training:
            scale = F.softplus(torch.einsum("bd,bed->be", mean, self.gate_noise[domains]))
            logits = logits + self.noise.normal(scale) * scale
        best = logits.topk(self.top, dim=1)
        return best.indices, best.values.softmax(dim=1)

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave the last pass out: its tensors belong to a graph."""
        return {**self.__dict__, "domains": None, "probabilities": None}


def mutual_information(probabilities: Tensor, domains: Tensor) -> Tensor:
    """Of domain and expert, nats: `sum P(e, d) log(P(e, d) / (P(e) P(d)))`.

    P(e | d) is the mean of the domain's rows, P(d) its share of the batch.

    Args:
        probabilities: [B, E] of the experts of each image.
        domains: [B] numbers from 0.
    """
    member = F.one_hot(domains).to(probabilities)  # [B, d]
    count = batch_sum(member.new_tensor(float(len(domains))))
    joint = batch_sum(member.t() @ probabilities) / count
    apart = joint.sum(dim=0, keepdim=True) * joint.sum(dim=1, keepdim=True)
    least = torch.finfo(joint.dtype).tiny  # a domain without images counts 0, its gradient too
    return (joint * (joint.clamp_min(least).log() - apart.clamp_min(least).log())).sum()
